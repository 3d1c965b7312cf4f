"""An agent with a face in a LiveKit room: ``python livekit_agent.py dev``, beside ``make serve``.

LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET say where the room is. Ears, wits and voice come from LiveKit's
inference here; any other of LiveKit's plugins does as well. Needs the extra ``livekit``.
"""

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, UserStateChangedEvent, cli, inference

from talksplat_client import AsyncClient
from talksplat_client.livekit import AvatarSession

server = AgentServer()


@server.rtc_session()
async def talk(job: JobContext) -> None:
    """One room."""
    await job.connect()
    client = AsyncClient("127.0.0.1:8001")
    job.add_shutdown_callback(client.close)
    session = AgentSession[None](
        stt=inference.STT("deepgram/nova-3"),
        llm=inference.LLM("openai/gpt-4.1-mini"),
        tts=inference.TTS("cartesia/sonic-3"),
    )
    face = AvatarSession(client, "ava")

    @session.on("user_state_changed")
    def listen(event: UserStateChangedEvent) -> None:
        face.listening = float(event.new_state == "speaking")

    await face.start(session, room=job.room)  # before the session
    await session.start(Agent(instructions="You are Ava. Answer in a sentence or two."), room=job.room)
    await session.generate_reply(instructions="Greet the user.")


if __name__ == "__main__":
    cli.run_app(server)
