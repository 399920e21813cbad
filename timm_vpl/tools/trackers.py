"""Observers of a run: what else hears of it beside its folder."""
import sys
from typing import Any

from ..errors import UsageError
from ..options.train import Options, recipe_values
from .export import ExportObserver
from .progress import Bars, Lines


class WandbObserver:
    """Sends the rows of summary.csv to Weights & Biases."""

    def start(self, run) -> None:
        """Begin, or go on with --wandb-resume-id.

        Raises:
            UsageError: The package is not there.
        """
        try:
            import wandb
        except ImportError as e:
            raise UsageError("--log-wandb: needs the package wandb (pip install 'timm-vpl[wandb]')") from e
        options, asked = run.options, run.options.run
        resume_id = {'id': asked.wandb_resume_id, 'resume': 'must'} if asked.wandb_resume_id else {}
        wandb.init(
            project=asked.wandb_project, name=asked.experiment, config=recipe_values(options),
            tags=list(asked.wandb_tags), **resume_id)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Send the row of an epoch."""
        import wandb
        wandb.log(row)


def observers_of(options: Options) -> list[Any]:
    """Return the observers that the options ask for; on a terminal bars show how far the run is."""
    run = options.run
    return [
        Bars() if sys.stderr.isatty() and not (run.quiet or run.no_progress) else Lines(),
        *[ExportObserver()] * run.export,
        *[WandbObserver()] * run.log_wandb]
