"""A Pipecat bot with a face: ``python pipecat_bot.py``, beside ``make serve``. Ears, wits and voice: OPENAI_API_KEY.

Its page comes with ``pip install 'pipecat-ai[runner,webrtc]'``. Any other of Pipecat's services and transports will do.
"""

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.run import main
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

from talksplat_client import AsyncClient
from talksplat_client.pipecat import TalksplatVideoService

VIDEO = {"enabled": True, "is_live": True, "framerate": 25, "width": 512, "height": 512}  # the avatar's size
MEDIA = {"audio_in_enabled": True, "audio_out_enabled": True, **{f"video_out_{key}": VIDEO[key] for key in VIDEO}}


async def bot(arguments: RunnerArguments) -> None:
    """One caller."""
    transport = await create_transport(arguments, {"webrtc": lambda: TransportParams.model_validate(MEDIA)})
    pair = LLMContextAggregatorPair(LLMContext(), user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer()))
    async with AsyncClient("127.0.0.1:8001") as client:
        talk = [OpenAISTTService(), pair.user(), OpenAILLMService(), OpenAITTSService()]
        show = [TalksplatVideoService(client, "ava"), transport.output(), pair.assistant()]
        runner = WorkerRunner(handle_sigint=arguments.handle_sigint)
        await runner.add_workers(PipelineWorker(Pipeline([transport.input(), *talk, *show])))
        await runner.run()


if __name__ == "__main__":
    main()
