"""Observers of a run: what else hears of it beside its folder."""
from typing import Any

from ..errors import UsageError
from ..options.options import recipe_values
from .export import ExportObserver


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
        args = run.args
        resume_id = {'id': args.wandb_resume_id, 'resume': 'must'} if args.wandb_resume_id else {}
        wandb.init(
            project=args.wandb_project, name=args.experiment, config=recipe_values(args), tags=args.wandb_tags,
            **resume_id)

    def validated(self, run, row: dict[str, Any]) -> None:
        """Send the row of an epoch."""
        import wandb
        wandb.log(row)


def observers_of(args) -> list[Any]:
    """Return the observers that the options ask for."""
    return [ExportObserver()] * args.export + [WandbObserver()] * args.log_wandb
