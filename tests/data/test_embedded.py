import collections
import dataclasses
import re

import pytest
import yaml

from rlaif_jax.data.embedded import ENDINGS, GREETINGS, KINDS, Prompt, generate, is_good
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import TEMPLATES
from tests.helpers import quickstart_config

CONFIG = quickstart_config()
CORPUS = generate(CONFIG.data.embedded, 0)
RICE = Prompt("How do I cook rice?", "cook", "rice", False)
GOOD = "Thank you for asking! Boil the rice in salted water until tender. I hope this helps."


def request(prompt):
    """What a prompt asks, without the words around it."""
    text = prompt.text.removeprefix(max(filter(prompt.text.startswith, GREETINGS), key=len))
    return text.removesuffix(max(filter(text.endswith, ENDINGS), key=len))


def templates(prompts):
    return {request(prompt).replace(prompt.topic, "{t}") for prompt in prompts}


def test_the_corpus_is_a_function_of_the_seed():
    assert generate(CONFIG.data.embedded, 0) == CORPUS
    assert generate(CONFIG.data.embedded, 1).demonstrations != CORPUS.demonstrations


def test_the_corpus_has_the_sizes_and_shares_asked_for():
    data, n = CONFIG.data.embedded, len(CORPUS.demonstrations)
    assert len(CORPUS.evaluation_prompts) == data.evaluation_combinations + data.evaluation_unseen_templates
    assert sum(p.unseen_template for p in CORPUS.evaluation_prompts) == data.evaluation_unseen_templates
    assert n == data.train_prompts * data.demonstrations_per_prompt
    counts = collections.Counter((d.polite, d.answers) for d in CORPUS.demonstrations)
    for polite, answers in ((True, True), (True, False), (False, True), (False, False)):
        share = (data.polite_share if polite else 1 - data.polite_share) * (
            data.answering_share if answers else 1 - data.answering_share
        )
        assert abs(counts[polite, answers] / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_no_evaluation_request_is_trained_on():
    training = {request(prompt) for prompt in CORPUS.train_prompts}
    assert set(CORPUS.train_prompts) == {d.prompt for d in CORPUS.demonstrations}
    assert len(CORPUS.train_prompts) == len(set(CORPUS.train_prompts))
    evaluated = [request(prompt) for prompt in CORPUS.evaluation_prompts]
    assert len(evaluated) == len(set(evaluated))
    assert training.isdisjoint(evaluated)


def test_unseen_templates_share_no_template_with_training():
    unseen = templates(p for p in CORPUS.evaluation_prompts if p.unseen_template)
    assert unseen
    assert unseen.isdisjoint(templates(CORPUS.train_prompts))
    assert templates(p for p in CORPUS.evaluation_prompts if not p.unseen_template) <= templates(CORPUS.train_prompts)


def test_the_judge_is_shown_no_prompt_or_topic_of_the_corpus():
    examples = yaml.safe_load((TEMPLATES / f"{CONFIG.judge.prompt.template}.yaml").read_text())["examples"]
    prompts = {p.text for p in (*CORPUS.train_prompts, *CORPUS.evaluation_prompts)}
    topics = {topic.lower() for kind in KINDS.values() for topic in kind.topics}
    for example in examples:
        assert example["prompt"] not in prompts
        assert topics.isdisjoint(re.findall(r"\w+", example["prompt"].lower()))


def test_the_ground_truth_of_a_demonstration_is_how_it_was_made():
    wrong = [d for d in CORPUS.demonstrations if is_good(d.prompt, d.reply) != (d.polite and d.answers)]
    assert wrong == []


def test_a_good_reply_is_good():
    assert is_good(RICE, GOOD)
    assert is_good(dataclasses.replace(RICE, topic="salmon"), GOOD.replace("rice", "salmon"))


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   ",
        "Thank you for asking!",  # manners alone
        "Boil the rice in salted water until tender.",  # an answer alone
        GOOD.replace("Thank you for asking!", "What a stupid question."),
        GOOD + " Get lost.",
        GOOD.replace("rice", "salmon"),  # the topic of another prompt
        "Thank you for asking! Practice chess for twenty minutes every day. I hope this helps.",
        "Thank you for asking! Visit the old town of rice on foot. I hope this helps.",  # the topic without an answer
        GOOD.replace("the rice", "the rice and the salmon"),
        GOOD + " The jacket is lovely.",  # a topic of the judge's examples
        GOOD + " I hope this helps.",  # says a thing twice
        GOOD + " Boil the rice in salted water until tender!",
        GOOD.removesuffix("."),
        GOOD.removesuffix(" helps."),
        "Thank you for asking! I like rice. Boil some water. I hope this helps.",  # topic and answer never together
    ],
)
def test_a_bad_reply_is_not_good(reply):
    assert not is_good(RICE, reply)


@pytest.mark.parametrize("field", ["evaluation_combinations", "evaluation_unseen_templates"])
def test_more_evaluation_prompts_than_there_are_is_one_clear_line(field):
    with pytest.raises(UserError, match=field) as error:
        generate(dataclasses.replace(CONFIG.data.embedded, **{field: 1000}), 0)
    assert "\n" not in str(error.value)
