"""Projectors of llama.cpp that fewbit has no row for, and why.

Source: PROJECTOR_TYPE_NAMES in tools/mtmd/clip-impl.h of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

_SOUND = "it is a tower for sound, and fewbit gives models no sound"
NO_TEXT = "fewbit reads no files of its language model"
_SPEECH = "it makes speech, and fewbit generates text"


def _no_model(name: str) -> str:
    return f"transformers 5.24 has no {name}"


def _no_text(name: str) -> str:
    return f"{NO_TEXT} ({name})"


UNREAD = {
    "adapter": _no_model("GLM-Edge-V"),
    "cogvlm": _no_model("CogVLM"),
    "deepseek4v": _no_text("deepseek4"),
    "deepseekocr": _no_text("deepseek2-ocr"),
    "deepseekocr2": _no_text("deepseek2-ocr"),
    "dots3note_a": _SOUND,
    "dots3note_v": _no_text("dots3note"),
    "dots_ocr": _no_model("dots.ocr"),
    "gemma3na": _SOUND,
    "gemma3nv": "transformers builds Gemma 3n's vision tower with the package timm, and never without its tower for "
    "sound, which fewbit does not read",
    "gemma4a": _SOUND,
    "gemma4ua": _SOUND,
    "glm5v": _no_text("glm5-next"),
    "glma": _SOUND,
    "granite_speech": _SOUND,
    "hunyuanvl": _no_text("hunyuan_vl"),
    "janus_pro": "transformers' model always has the parts that draw images, and a file lacks them",
    "kimivl": _no_model("Kimi-VL"),
    "ldp": _no_model("MobileVLM"),
    "ldpv2": _no_model("MobileVLM"),
    "lfm2a": _SOUND,
    "ling3vl": _no_model("Ling 3 VL"),
    "meralion": _SOUND,
    "mimo_audio": _SOUND,
    "mimovl": _no_model("MiMo V2 with towers (MiMoV2ForCausalLM)"),
    "minimax_m3": _no_text("minimax-m3"),
    "muse-glimmer": _no_text("muse-glimmer"),
    "musicflamingo": _SOUND,
    "nemotron_v2_vl": _no_model("Nemotron Nano V2 VL"),
    "paddleocr": _no_text("paddleocr"),
    "parakeet": _SOUND,
    "phi4": _no_model("Phi-4 with vision alone (Phi4ForCausalLMV)"),
    "pockettts_gen": _SPEECH,
    "pockettts_spkenc": _SPEECH,
    "qwen2.5o": "transformers' model of Qwen2.5-Omni is never without its tower for sound, which fewbit does not read",
    "qwen2a": _SOUND,
    "qwen3a": _SOUND,
    "qwen3tts_gen": _SPEECH,
    "qwen3tts_spkenc": _SPEECH,
    "resampler": _no_model("MiniCPM-V before 4.6"),
    "step3vl": _no_model("Step3-VL"),
    "ultravox": _SOUND,
    "voxtral": _SOUND,
    "yasa2": _no_model("Yasa 2"),
    "youtuvl": _no_model("Youtu-VL"),
}
