"""Upload a model to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.cli.flags import checked
from fewbit.cli.options import Json, printed


@checked
def push(
    model: Annotated[str, typer.Argument(help="A folder or a .gguf file, such as the output of quantize.")],
    repo: Annotated[str, typer.Argument(help="Name of the repository, OWNER/NAME.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make a public repository, or upload into one. Default: private.")
    ] = False,
    report: Annotated[
        str | None, typer.Option(help="Folder of a report of compare, whose chart goes into the card. Default: none.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, which is created if needed. Default: the main one.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit. Default: Upload NAME by fewbit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes. Upload nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Upload MODEL to the repository REPO of the Hugging Face Hub, with a model card."""
    from fewbit.api import requested

    requested.check_upload(model, report)
    from fewbit.api import push as api
    from fewbit.report import text

    if dry_run:
        done = api.preview(model, repo, report=report)
    else:
        done = api.push(model, repo, public=public, report=report, revision=revision, message=message, progress=True)
    printed(asdict(done)) if as_json else text.pushed(done)
