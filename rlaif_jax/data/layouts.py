"""How a row becomes a prompt, and what is left out of a prompt that is too long.

A prompt is one text. A text in the form of HH-RLHF ("\n\nHuman: ...\n\nAssistant:") is a dialogue of several turns;
any other text is one turn of the user.
"""

import bisect
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from rlaif_jax.data.sources import Malformed

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt and its shorter versions, the longest first."""

    versions: Sequence[str]

    def fitted(self, tokens: Callable[[str], int], limit: int) -> str | None:
        """The longest version of at most `limit` tokens; None where none is."""
        if tokens(self.versions[0]) <= limit:
            return self.versions[0]
        first = bisect.bisect_left(range(len(self.versions)), True, key=lambda i: tokens(self.versions[i]) <= limit)
        return self.versions[first] if first < len(self.versions) else None


def messages(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt, as chat templates take them: [{"role": ..., "content": ...}, ...]."""
    if not prompt.startswith("\n\nHuman:"):
        return [{"role": "user", "content": prompt}]
    parts = _TURN.split(prompt)[1:]  # role, text, role, text, ...
    turns = [{"role": _ROLES[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2])]  # noqa: B905
    return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"] else turns


def request(row: Mapping) -> Draft | Malformed:
    """The field `prompt` as it is; never shortened."""
    return _texts(row, "prompt") or Draft([row["prompt"].strip()])


def tldr(row: Mapping) -> Draft | Malformed:
    """A Reddit post to summarise (Stiennon et al., arXiv 2009.01325, table 2): `subreddit`, `title`, `post`.

    A row may hold the whole text as `prompt` instead (trl-lib/tldr). The post is shortened, never the rest.
    """
    if "prompt" in row:
        found = re.fullmatch(r"SUBREDDIT: r/(.*?)\n\nTITLE: (.*?)\n\nPOST: (.*)\n\nTL;DR:\s*", str(row["prompt"]), re.S)
        if not found:
            return Malformed("prompt is not in the TL;DR layout")
        row = dict(zip(("subreddit", "title", "post"), found.groups(), strict=True))
    return _texts(row, "subreddit", "title", "post") or _shortened(
        f"SUBREDDIT: r/{row['subreddit'].strip()}\n\nTITLE: {row['title'].strip()}\n\nPOST: ", row["post"], "\n\nTL;DR:"
    )


def abstract(row: Mapping) -> Draft | Malformed:
    """A paper to summarise: `title`, if any, and `source` (a text or a list of sentences), which is shortened."""
    if isinstance(row.get("source"), list):
        row = {**row, "source": " ".join(map(str, row["source"]))}
    title = f"TITLE: {row['title']}\n\n" if isinstance(row.get("title"), str) else ""
    return _texts(row, "source") or _shortened(f"{title}ABSTRACT: ", row["source"], "\n\nTL;DR:")


def dialogue(row: Mapping) -> Draft | Malformed:
    """A dialogue of HH-RLHF (Bai et al., arXiv 2204.05862): `prompt`.

    The earliest exchanges are left out first; the last turn of the human always stays whole. A prompt without turns
    is the human's first.
    """
    if problem := _texts(row, "prompt"):
        return problem
    text = row["prompt"]
    if not _TURN.match(text):
        text = f"\n\nHuman: {text.strip()}\n\nAssistant:"
    turns = messages(text)
    if turns[-1]["role"] != "user" or not all(turn["content"] for turn in turns):
        return Malformed("the human does not have the last turn, or a turn is empty")
    starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    return Draft([_dialogue_text(turns[start:]) for start in starts])


def split_dialogues(row: Mapping) -> Mapping:
    """A row of two whole dialogues (`response_a`, `response_b`) with what they share as its `prompt`.

    They share all turns up to the assistant's in which they part (Anthropic/hh-rlhf has no other prompt); the fields
    that hold whole dialogues keep what follows. Other rows come back as they are.
    """
    a, b = row.get("response_a"), row.get("response_b")
    if "prompt" in row or not isinstance(a, str) or not isinstance(b, str):
        return row
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905
    marker = "\n\nAssistant:"
    prompt = a[: a.rfind(marker, 0, same) + len(marker)] if marker in a[:same] else ""
    rest = {name: value.removeprefix(prompt) for name, value in row.items() if isinstance(value, str)}
    return {**row, **rest, "prompt": prompt}


LAYOUTS: dict[str, Callable[[Mapping], Draft | Malformed]] = {
    "request": request,
    "tldr": tldr,
    "abstract": abstract,
    "dialogue": dialogue,
}


def _dialogue_text(turns: list[dict[str, str]]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns) + "\n\nAssistant:"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can spell half of a character, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _texts(row: Mapping, *names: str) -> Malformed | None:
    """What is wrong with the first field that is not a text with something in it; None where all are."""
    for name in names:
        if name not in row:
            return Malformed(f"no field {name}")
        if not isinstance(row[name], str):
            return Malformed(f"{name} is not text")
        if not is_unicode(row[name]):
            return Malformed(f"{name} is not valid Unicode")
        if not row[name].strip():
            return Malformed(f"{name} is empty")
    return None


def _shortened(before: str, body: str, after: str) -> Draft:
    """Versions whose body ends at a sentence or paragraph; the first sentence always stays."""
    body = body.strip()
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|\S(?=\n)", body)] + [len(body)]
    return Draft([before + body[:end] + after for end in reversed(ends)])
