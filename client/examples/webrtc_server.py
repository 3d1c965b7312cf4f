"""An avatar in a browser by WebRTC: ``python webrtc_server.py`` beside ``make serve``. Extra ``webrtc``; aiohttp."""

from aiohttp import web
from aiortc import RTCPeerConnection, RTCSessionDescription

from talksplat_client import AsyncClient, TalksplatError
from talksplat_client.webrtc import AvatarTracks, prefer_h264


async def main(url: str = "127.0.0.1:8001") -> web.Application:
    """A page, and an avatar for everybody who opens it."""
    client, app = AsyncClient(url), web.Application()

    async def page(request: web.Request) -> web.FileResponse:
        return web.FileResponse(__file__.replace(".py", ".html"))

    async def offer(request: web.Request) -> web.Response:
        try:
            peer, tracks = RTCPeerConnection(), await AvatarTracks.load(client, "ava")
        except TalksplatError as error:
            raise web.HTTPBadGateway(text=str(error)) from error

        async def say(text: str) -> None:
            async for sound in client.synthesize(text):
                tracks.say(sound, (await client.clock()).sample_rate)

        peer.on("datachannel", lambda channel: channel.on("message", say))
        await peer.setRemoteDescription(RTCSessionDescription(**await request.json()))
        peer.addTrack(tracks.video)
        peer.addTrack(tracks.audio)
        prefer_h264(peer)
        await peer.setLocalDescription(await peer.createAnswer())
        return web.json_response({"sdp": peer.localDescription.sdp, "type": peer.localDescription.type})

    app.add_routes([web.get("/", page), web.post("/offer", offer)])
    return app


if __name__ == "__main__":
    web.run_app(main(), host="127.0.0.1", port=8090)
