"""Loading a whole model to use it: `from_pretrained`, with fewbit serving every format it knows."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from fewbit.errors import FewbitError, FormatError
from fewbit.models import plugin
from fewbit.models.source import Source


def load_model(
    source: Source,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    kernel: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of `source`, quantized weights packed, in evaluation mode.

    dtype: of activations and of what is not quantized; "auto" is the checkpoint's own. device: where it goes, or
    "auto" to spread it over what there is. kernel: the one to use for all, KernelError if it cannot.
    """
    verbose = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with plugin.serving(kernel):
            model = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, device_map=device, trust_remote_code=trust_remote_code
            )
    except FewbitError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise FormatError(f"{source.folder} could not be loaded: {str(error).strip().splitlines()[0][:300]}") from error
    finally:
        if verbose:
            hf_logging.enable_progress_bar()
    assert isinstance(model, PreTrainedModel)
    model.eval()
    return model
