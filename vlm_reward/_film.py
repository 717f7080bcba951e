"""Films of episodes: the cameras' views side by side, a figure of their rewards below."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlm_reward._jobs import replacing

FRAME_RATE = 20
EVERY = 2  # only each second step is shown: Meta-World's are 12.5 ms, so this is half its real speed
DPI = 100


def write_film(
    path: Path, clips: Sequence[np.ndarray], figure: Figure, point_at: Callable[[int, int], None]
) -> None:
    """Write an MP4 of one clip after another; the file appears whole or not at all.

    Args:
        path: the file.
        clips: uint8 [T, V, H, W, 3], all with the same views. Small frames are enlarged, to be seen beside
            the figure.
        figure: what to show below; its size is set here.
        point_at: called with the number of the clip and the step, to move the figure's cursor there.

    Raises:
        OSError: the file could not be written.
    """
    _, views, height, width, _ = clips[0].shape
    scale = -(-480 // (views * width))
    across, down = scale * views * width // 2 * 2, scale * height // 2 * 2  # h264 wants even sides
    below = max(224, down)
    figure.set_dpi(DPI)
    figure.set_size_inches(across / DPI, below / DPI)
    canvas = FigureCanvasAgg(figure)
    with replacing(path) as fresh, av.open(str(fresh), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=FRAME_RATE, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = across, down + below, "yuv420p"
        for number, clip in enumerate(clips):
            for step in range(0, len(clip), EVERY):
                point_at(number, step)
                canvas.draw()
                seen = np.concatenate(list(clip[step].repeat(scale, 1).repeat(scale, 2)), axis=1)
                panel = np.asarray(canvas.buffer_rgba())[:below, :across, :3]
                picture = np.ascontiguousarray(np.concatenate([seen[:down, :across], panel]))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
