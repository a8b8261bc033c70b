"""Commands by which reward models leave jarm: in the form of other programs, and as a server."""

from __future__ import annotations

from typing import Annotated

import tyro

from jarm.commands.options import built_by
from jarm.core.compiled import keep_compiled
from jarm.core.streams import show
from jarm.studies.export import ExportConfig, export
from jarm.studies.serve import ServeConfig, serve


def export_command(config: Annotated[ExportConfig, tyro.conf.OmitArgPrefixes, built_by(ExportConfig)]) -> None:
    """Write a reward model in the form of another program, or refuse what that form cannot hold.

    jarm export --model out/model --to cross-encoder --llm MODEL --out out/export
    """
    keep_compiled()
    found = export(config)
    if "rank_correlation" in found:
        show(
            f"The linear model ranks embeddings that were left out of its fit as the model does to a correlation of "
            f"{found['rank_correlation']:.3f} (Spearman); 1 would be no loss."
        )
    if "constant" in found:
        show(f"Rewards are the scores there plus {found['constant']:.6g}, which changes no ranking and no difference.")
    show(config.out)


def serve_command(config: Annotated[ServeConfig, tyro.conf.OmitArgPrefixes, built_by(ServeConfig)]) -> None:
    """Serve the rewards of texts over HTTP, to this machine unless told otherwise, until it is stopped.

    jarm serve --model out/model --llm MODEL --port 8000
    """
    keep_compiled()
    serve(config)
