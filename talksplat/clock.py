"""The one clock: how samples, frames and chunks relate, on every side of the wire.

A request carries one *chunk* of frames inside a fixed *window* of audio::

    |<------ LEFT_CONTEXT ------>|<-- CHUNK_SAMPLES -->|<- LOOK_AHEAD ->|
    |<---------------------------- WINDOW ----------------------------->|

so that shapes never change, requests of different tenants batch together, and no request depends on
another one's result.
"""

SAMPLE_RATE = 16_000  # Hz, mono float32 in [-1, 1]
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640

CHUNK_FRAMES = 4
CHUNK_SAMPLES = CHUNK_FRAMES * SAMPLES_PER_FRAME  # 2560, 160 ms

LEFT_CONTEXT = 16 * SAMPLES_PER_FRAME  # 10240, 640 ms
LOOK_AHEAD = 3 * SAMPLES_PER_FRAME  # 1920, 120 ms
WINDOW = LEFT_CONTEXT + CHUNK_SAMPLES + LOOK_AHEAD  # 14720, 920 ms

MAX_UTTERANCE_SECONDS = 30  # of one `transcribe` or `speech_to_animation` request
