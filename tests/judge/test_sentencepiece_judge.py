"""Judges whose tokenizers put a token before texts, and a blank of their own (Llama 2, Mistral) or none (Gemma)."""

import dataclasses

import jax
import numpy as np
import pytest
import yaml

from rlaif_jax.judge.prompts import encode
from rlaif_jax.judge.score import judge_pairs, suffix_tokens
from tests.data.test_continuing import LLAMA_2, ROLES
from tests.gguf_files import sentencepiece_fields, sentencepiece_reference
from tests.helpers import full_logits
from tests.judge.conftest import PAIRS, judge_with
from tests.tiny_judge import write_judge

TEMPLATE = {
    "preambles": {"base": "Which reply is fine?"},
    "comparison": "Of rice: {prompt}\n1: {response_1}\n2: {response_2}",
    "verdict": "\n\nThe capital is",
    "choices": [" rice", " hello"],  # a token each
    "reasoning": {"cue": "\n\nI am", "stop": ["\n", "rice"]},
    "examples": [],
}


@pytest.fixture(scope="module", params=["llama", "gemma"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def judges(config, kind, tmp_path_factory):
    """By the layout of chats, None for plain text."""
    folder = tmp_path_factory.mktemp(kind)
    (folder / "template.yaml").write_text(yaml.safe_dump(TEMPLATE))
    fields = sentencepiece_fields(sentencepiece_reference()[kind])
    prompt, found = {"template": str(folder / "template.yaml"), "shots": 0}, {}
    for layout in (None, LLAMA_2, ROLES):
        weights = write_judge(folder / f"{len(found)}.gguf", fields=fields, chat_template=layout)
        found[layout] = judge_with(config, weights=weights, prompt=prompt | {"chat": layout is not None})
    return found


@pytest.mark.parametrize("layout", [None, LLAMA_2, ROLES])
def test_preamble_rest_and_choice_are_the_tokens_of_the_whole_text(judges, layout):
    judge = judges[layout]
    bos, tokenizer = judge.tokenizer.bos_token_id, judge.tokenizer
    assert len(judge.preamble) > 3
    for pair in PAIRS:
        for prompt, rest in zip(judge.template.asked(pair), suffix_tokens(judge, pair), strict=True):
            for choice, tokens in zip(judge.template.choices, judge.choices, strict=True):
                whole = tokenizer(prompt.text + choice, add_special_tokens=layout is None)["input_ids"]
                assert [*judge.preamble, *rest, *tokens] == whole
                assert whole[0] == bos and whole[1:].count(bos) == 0
    text = judge.template.asked(PAIRS[0])[0].text
    assert [role in text for role in ("[INST] Which", " [/INST]The")] == [layout == LLAMA_2] * 2


def test_scores_equal_a_plain_forward_pass_of_each_whole_text(judges):
    judge = judges[None]
    (judgement,) = judge_pairs(judge, PAIRS[:1])
    scores = []
    for choice, answer in zip(TEMPLATE["choices"], judge.choices, strict=True):
        tokens = judge.tokenizer(judge.template.asked(PAIRS[0])[0].text + choice)["input_ids"]
        logits = full_logits(judge.scorer.model, judge.scorer.params, np.array([tokens], np.int32))[0]
        logprobs = jax.nn.log_softmax(logits[-len(answer) - 1 : -1])
        scores.append(logprobs[np.arange(len(answer)), answer].sum())
    expected = 1 / (1 + np.exp(scores[1] - scores[0]))
    assert judgement.verdict.prob_a_forward == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layout", [None, LLAMA_2, ROLES])
def test_what_follows_a_preamble_that_ends_within_a_word_begins_no_text(judges, layout):
    judge = judges[layout]
    prompt = judge.template.asked(PAIRS[0])[0]
    read = prompt.message[: prompt.message.index(" rice") + 3]  # " ri", where the whole has a token " rice"
    (preamble,) = encode(judge.tokenizer, [prompt._replace(message=read, turn="", reply="")])
    cut = dataclasses.replace(judge, preamble=tuple(preamble))
    assert tuple(encode(judge.tokenizer, [prompt])[0][: len(preamble)]) != cut.preamble
    rest = suffix_tokens(cut, PAIRS[0])[0]
    whole = judge.tokenizer(prompt.text, add_special_tokens=layout is None)["input_ids"]
    assert judge.tokenizer.decode([*preamble, *rest]) == judge.tokenizer.decode(whole)


def test_questions_after_a_rationale_continue_it(judges):
    plain = judges[None].config
    rationale = dataclasses.replace(plain.rationale, max_new_tokens=6)
    judge = judge_with(plain, prompt={"chain_of_thought": True}, rationale=rationale)
    assert "▁" not in judge.tokenizer.convert_ids_to_tokens(judge.reasoner.verdict.tokens)
    (judgement,) = judge_pairs(judge, PAIRS[:1])
    assert judgement.status == "ok"
