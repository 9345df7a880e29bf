"""T5's tokenizer from the files that lie beside its weights, and how DeepFloyd IF tidies captions."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Engine

from sfumato.text.tokenizers import Tokenizer

__all__ = ["t5_tokenizer", "tidy"]

PAD = "<pad>"
CONTEXT = 512
REPAIR = "in an environment with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"


def t5_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder's tokenizer.json, which pads to the length that its files say, else to 512.

    Raises: ValueError in one line if the folder has none, or it is not T5's; a spiece.model alone has to be
        converted once.
    """
    file, told = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        if (folder / "spiece.model").is_file():
            raise ValueError(f"{folder} has its vocabulary as spiece.model; write tokenizer.json, {REPAIR}")
        raise ValueError(f"{folder} holds no T5 vocabulary: there is no tokenizer.json")
    try:
        engine = Engine.from_file(str(file))
        config = json.loads(told.read_text("utf-8")) if told.is_file() else {}
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}"
        ) from None
    number = engine.token_to_id(PAD)
    if number is None or engine.token_to_id("</s>") is None:
        raise ValueError(f"the tokenizer in {folder} is not T5's: it lacks {PAD} or </s>")
    context = config.get("model_max_length")
    context = context if isinstance(context, int) and context < 2**16 else CONTEXT  # 1e30 = not known
    engine.enable_padding(length=context, pad_id=number, pad_token=PAD)
    return Tokenizer(engine, context)


def tidy(tokenizer: Tokenizer, context: int = 77) -> Tokenizer:
    """The same, with IF's rules for captions in front of its own and IF's length."""
    engine = Engine.from_str(tokenizer.to_json())
    own = [engine.normalizer] if engine.normalizer is not None else []
    rules = [normalizers.Replace(Regex(pattern), text) for pattern, text in RULES]
    last = [normalizers.Strip()]
    engine.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rules, *last, *own])
    return Tokenizer(engine, context)


# What the published code cuts out of captions, in its order.
RULES: tuple[tuple[str, str], ...] = ()
