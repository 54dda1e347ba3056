"""The command `fewbit tune`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Json, Model, Overwrite, printed
from fewbit.models import stated
from fewbit.models.loading import Loading
from fewbit.pipeline.optimization import Optimization
from fewbit.texts.calibration import Calibration


@checked
def tune(
    model: Model,
    reference: Annotated[str, typer.Option(help="The original: the model that MODEL was quantized from.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder or .gguf file to make.")],
    calibration: Annotated[Calibration, Fields("samples", "length", "seed", text="calibration")] = Calibration(),
    optimization: Optimization = Optimization(),
    overwrite: Overwrite = False,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Train scales, norms and biases of the quantized MODEL to match the predictions of its original."""
    from fewbit.api import requested

    requested.check_tuned(model, output)
    stated.check_vocabularies(reference, model)
    from fewbit.api import tune as api
    from fewbit.report import text as report

    done = api.tune(
        model,
        output,
        reference=reference,
        calibration=calibration,
        optimization=optimization,
        overwrite=overwrite,
        device=loading.device,
        trust_remote_code=loading.trust_remote_code,
        progress=True,
    )
    printed(asdict(done)) if as_json else report.tuned(done)
