"""What a run says while it goes: a progress bar, JSON lines, tensorboard, and a plot of its losses."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from ..console import forget_output
from ..errors import reason
from ..files.whole import written_whole
from ..generate import save_picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm

GAINS = {
    "image_gain": "without the image",
    "reference_gain": "with another picture's image",
    "lora_gain": "without the LoRA",
}
"""How much worse validation gets so; other numbers whose names end in _gain are drawn by their names."""
SMOOTH = 60
"""From so many points on, a curve has no markers, and the training loss a running mean."""


class Log:
    """Writes events of a run; only the main process has one that is ``active``."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        active: bool = True,
        as_json: bool = False,
        tensorboard: bool = True,
        plots: bool = True,
    ):
        self.file, self.plot_file = folder / "progress.jsonl", folder / "loss.png"
        self.active, self.as_json, self.plots = active, as_json, plots
        self._folder, self._steps, self._tensorboard = folder, steps, tensorboard
        self._bar: tqdm[NoReturn] | None = None
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._show(self._bar.close)
        self._board("close")

    def say(self, text: str) -> None:
        """A line for people, or a note in the JSON stream."""
        if not self.active:
            return
        if self.as_json:
            self._print({"event": "note", "text": text})
        elif self._bar is not None:
            self._show(self._bar.write, text, file=sys.stderr)
        else:
            self._show(print, text, file=sys.stderr, flush=True)

    def begin(self, step: int) -> None:
        """Training starts after ``step``; what a killed run had logged beyond it is taken back."""
        if not self.active:
            return
        from tqdm import tqdm

        if self.file.is_file():
            lines = [
                line
                for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines()
                if step > 0 and _step_of(line) <= step
            ]
            # whole: a kill here must not cost the log of the whole run
            with written_whole(self.file) as place:
                place.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if self._tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.say("tensorboard is not installed; its log is left out (pip install tensorboard)")
            else:
                self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)
        quiet = self.as_json or not sys.stderr.isatty()
        self._bar = tqdm(total=self._steps, initial=step, desc="training", disable=quiet, file=sys.stderr)

    def event(self, kind: str, step: int, **values: object) -> None:
        """One line of progress.jsonl; numbers also go to tensorboard."""
        if not self.active:
            return
        row = {"event": kind, "step": step, **values}
        try:
            if self.file.is_fifo():
                raise OSError("it is a pipe, which would wait for ever")
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a full disk must not end the training that is in memory
            self.say(f"{self.file} could not be written ({error})")
        if self.as_json:
            self._print({**row, "steps": self._steps})
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board("add_scalar", f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, pixels: object) -> None:
        """A picture ``y x 3`` for tensorboard."""
        self._board("add_image", name, pixels, step, dataformats="HWC")

    def tick(self, step: int, loss: float) -> None:
        """One step is done."""
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._show(self._bar.update, step - self._bar.n)

    def plot(self) -> None:
        """Draw the losses of the whole run to loss.png."""
        if self.active and self.plots and self.file.is_file():
            try:
                draw_losses(self.file, self.plot_file)
            except (OSError, MemoryError) as error:
                self.say(f"{self.plot_file} could not be drawn ({reason(error)})")
                return
            if self.as_json:
                self._print({"event": "plot", "file": str(self.plot_file)})

    def _board(self, method: str, *args: object, **options: object) -> None:
        """Tensorboard's writer hands on at the next call what its thread could not write: then it is left behind."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*args, **options)
        except OSError as error:
            self._writer = None
            self.say(f"tensorboard's log could not be written ({error}); it ends here, the training goes on")

    def _show(self, write: Callable[..., object], *args: object, **options: object) -> None:
        """The terminal may have been closed: what is learned is still to be saved."""
        try:
            write(*args, **options)
        except OSError:
            if self._bar is not None:
                self._bar.disable = True

    def _print(self, row: dict[str, object]) -> None:
        try:
            print(json.dumps(row), flush=True)
        except OSError:  # whoever watched is gone; the loop still has to save what was learned
            self.as_json = False
            forget_output()


def curves(file: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The curves in a progress.jsonl, each as steps and values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a killed run
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        for name, value in row.items():
            if (name in ("loss", "validation") or str(name).endswith("_gain")) and isinstance(value, (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def draw_losses(source: Path, target: Path) -> None:
    """Training and validation loss; below them the two gains, where the run has any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = curves(source)
    gains = sorted((name for name in found if name.endswith("_gain")), key=lambda name: [*GAINS, name].index(name))
    figure: Any = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1 + bool(gains), 1, sharex=True, squeeze=False)[:, 0]
    if "loss" in found:
        steps, values = found["loss"]
        many = len(values) > SMOOTH
        panels[0].plot(steps, values, color="C0", alpha=0.3 if many else 1.0, label="training", marker=_marker(values))
        if many:
            panels[0].plot(steps, running_mean(values, len(values) // 20), color="C0", label="training, running mean")
    if "validation" in found:
        steps, values = found["validation"]
        panels[0].plot(steps, values, color="C1", label="validation", marker=_marker(values))
    panels[0].set_ylabel("loss")
    for number, name in enumerate(gains):
        steps, values = found[name]
        panels[1].plot(steps, values, color=f"C{2 + number}", label=GAINS.get(name, name), marker=_marker(values))
    if gains:
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set_ylabel("validation loss added")
    for axes in panels:
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[1]) > 0:
            axes.legend()
    panels[-1].set_xlabel("step")
    with written_whole(target) as place:
        figure.savefig(place, format="png", dpi=100)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value's mean with its neighbours, up to ``width`` on either side (as many on both, so ends do not lean)."""
    means: list[float] = []
    for i in range(len(values)):
        reach = min(width, i, len(values) - 1 - i)
        near = values[i - reach : i + reach + 1]
        means.append(sum(near) / len(near))
    return means


def _marker(values: Sequence[float]) -> str | None:
    return "." if len(values) < SMOOTH else None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return float("inf")


def save_sheet(sheet: Image.Image, folder: Path, step: int) -> Path:
    """Write ``sheet-<step>.png`` and, for who looks for the newest, ``sheet.png``."""
    path = folder / f"sheet-{step:08d}.png"
    save_picture(sheet, path, {"step": step})
    save_picture(sheet, folder / "sheet.png", {"step": step})
    return path
