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


FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0"
    r"\uFE31\uFE32\uFE58\uFE63\uFF0D]+"
)
# What the published code cuts out of captions, in its order; without the repair of broken encodings, of words
# that more than three hyphens join, and of quotes around a whole caption.
RULES: tuple[tuple[str, str], ...] = (
    (r"\+|%20", " "),
    (r"<person>", "person"),
    (r"\bhttps?:(?:/{1,3}|[a-z0-9%])", ""),
    (r"\b[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)", ""),
    (r"<[^<>]*>", ""),
    (r"&(?:quot|amp|nbsp|lt|gt|apos);?", ""),
    (r"@\w+\b", ""),
    (r"[\u31c0-\u9fff]+", ""),
    (DASHES, "-"),
    (r"[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    (r"[\u2018\u2019]", "'"),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),
    (rf"\S+\.(?:{FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
    (r"\b[a-z]{1,3}\d{3,15}\b|\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping|(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(?<=[^\d][,./])(?=\w)", " "),
    (r"\s+", " "),
    (r"^ |^ ?['_,\-:;]|['_,\-:+] ?$", ""),
)
