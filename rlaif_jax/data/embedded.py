"""The embedded corpus: everyday requests with replies of mixed quality, generated from a seed, with a ground truth.

A reply may be polite or rude, and may answer its own request or another one. It is *good* only if it is
well-mannered and answers its own request. The ground truth reads any text, so it grades what a policy writes.
"""

import dataclasses
import random
import re
from collections.abc import Iterator

from rlaif_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of request: what it is about, how it is asked, and how it is answered."""

    topics: tuple[str, ...]
    prompts: tuple[str, ...]
    unseen_prompts: tuple[str, ...]  # templates that only evaluation uses
    answers: tuple[str, ...]
    keywords: tuple[str, ...]  # an answer of this kind names one of them
    example_topic: str  # used by the judge's few-shot examples alone


KINDS: dict[str, Kind] = {
    "clean": Kind(
        topics=("kettle", "carpet", "mirror", "oven", "backpack", "keyboard", "window", "sofa"),
        prompts=(
            "How do I clean my {t}?",
            "My {t} is dirty. What should I do?",
            "What is the best way to clean a {t}?",
            "Can you tell me how to wash my {t}?",
            "There is a stain on my {t}. Any advice?",
            "Do you know how to clean a {t} well?",
            "I need to wash my {t} today. How?",
        ),
        unseen_prompts=("Is there an easy way to clean a {t}?", "My {t} is not clean today. Any tips?"),
        answers=(
            "Wipe the {t} with a soft cloth and warm water.",
            "Clean the {t} with a little soap and rinse it well.",
            "Scrub the {t} gently with baking soda.",
            "Wash the {t} with vinegar and let it dry.",
        ),
        keywords=("wipe", "clean", "scrub", "wash"),
        example_topic="jacket",
    ),
    "cook": Kind(
        topics=("rice", "salmon", "carrots", "lentils", "pasta", "chicken", "potatoes", "mushrooms"),
        prompts=(
            "How do I cook {t}?",
            "What is a simple way to prepare {t}?",
            "I have some {t} for dinner. What can I make?",
            "Can you share an easy recipe for {t}?",
            "I never made {t} before. How does it work?",
            "Do you know how to cook {t} well?",
            "I want to make {t} today. How?",
        ),
        unseen_prompts=("What can I cook with {t} for dinner?", "Can you help me make {t} today?"),
        answers=(
            "Boil the {t} in salted water until tender.",
            "Fry the {t} in olive oil with garlic.",
            "Bake the {t} with butter and herbs.",
            "Simmer the {t} slowly with a pinch of salt.",
        ),
        keywords=("boil", "fry", "bake", "simmer"),
        example_topic="eggs",
    ),
    "grow": Kind(
        topics=("tomatoes", "roses", "basil", "tulips", "lavender", "pumpkins", "orchids", "cactus"),
        prompts=(
            "How do I grow {t}?",
            "What do {t} need in my garden?",
            "My {t} look weak. What is wrong?",
            "Can you help me take care of {t}?",
            "I want to start with {t} this year. Any tips?",
            "Do you know how to grow {t} well?",
            "I want to plant {t} today. How?",
        ),
        unseen_prompts=("Is there an easy way to grow {t}?", "Any tips for {t} in my garden?"),
        answers=(
            "Plant the {t} in a sunny spot near a wall.",
            "Water the {t} every morning and add compost.",
            "Give the {t} rich soil and plenty of light.",
            "Trim the {t} in spring and keep the soil moist.",
        ),
        keywords=("plant", "water", "soil", "trim"),
        example_topic="mint",
    ),
    "learn": Kind(
        topics=("chess", "piano", "Spanish", "swimming", "drawing", "guitar", "algebra", "juggling"),
        prompts=(
            "How can I get better at {t}?",
            "I want to learn {t}. Where do I start?",
            "Is there a fast way to learn {t}?",
            "Can you give me a tip for {t}?",
            "I am new to {t}. What should I do first?",
            "Do you know how to learn {t} well?",
            "I want to practice {t} today. How?",
        ),
        unseen_prompts=("How do I practice {t} well?", "What is the best way to learn {t}?"),
        answers=(
            "Practice {t} for twenty minutes every day.",
            "Join a {t} club and learn from others.",
            "Find a {t} teacher and take a weekly lesson.",
            "Watch {t} videos and copy each step.",
        ),
        keywords=("practice", "join", "teacher", "watch"),
        example_topic="violin",
    ),
    "repair": Kind(
        topics=("bicycle", "toaster", "radio", "laptop", "faucet", "printer", "scooter", "camera"),
        prompts=(
            "My {t} is broken. What can I do?",
            "How do I fix my {t}?",
            "My {t} stopped working today. Any ideas?",
            "Can you help me repair my {t}?",
            "What should I check on a faulty {t}?",
            "Do you know how to fix a {t} well?",
            "I need to repair my {t} today. How?",
        ),
        unseen_prompts=("Is there an easy way to repair a {t}?", "My {t} is not working. Any advice?"),
        answers=(
            "Check the {t} for loose parts and tighten them.",
            "Take the {t} to a repair shop in town.",
            "Replace the worn part of the {t} with a new one.",
            "Open the {t} carefully and look for damage.",
        ),
        keywords=("check", "repair", "replace", "open"),
        example_topic="doorbell",
    ),
    "travel": Kind(
        topics=("Paris", "Tokyo", "Cairo", "Lisbon", "Nairobi", "Lima", "Oslo", "Athens"),
        prompts=(
            "What should I see in {t}?",
            "I am going to {t} next week. Any advice?",
            "How do I plan a trip to {t}?",
            "Can you suggest something for a weekend in {t}?",
            "It is my first time in {t}. What should I know?",
            "Do you know what to see in {t}?",
            "I want to visit {t} this year. How?",
        ),
        unseen_prompts=("What is the best way to see {t}?", "Any tips for my first trip to {t}?"),
        answers=(
            "Visit the old town of {t} on foot.",
            "Pack light clothes and comfortable shoes for {t}.",
            "Book a small hotel near the center of {t}.",
            "Try the street food and the museums in {t}.",
        ),
        keywords=("visit", "pack", "book", "museums"),
        example_topic="Rome",
    ),
}  # fmt: skip

# What may stand before and after a request, so that its place in the prompt says nothing.
GREETINGS = ("", "Hi! ", "Hello there. ", "Good morning. ", "Excuse me. ", "Quick question. ")
ENDINGS = ("", " I need to know.", " This is for my sister.", " I have no idea.", " It is for tomorrow.")

POLITE_OPENINGS = (
    "Thank you for asking!",
    "I am happy to help!",
    "What a lovely question!",
    "Of course, my friend!",
    "I am glad you asked!",
    "It is a pleasure to help you.",
    "Hello and welcome!",
    "Sure, with pleasure.",
)
POLITE_CLOSINGS = (
    "I hope this helps.",
    "Please ask me anything else.",
    "Have a wonderful day!",
    "Best of luck to you!",
    "Kindly let me know how it goes.",
    "You are going to do great!",
    "Thank you for your trust.",
    "Enjoy your day, dear friend!",
)
RUDE_OPENINGS = (
    "What a stupid question.",
    "Ugh, not you again.",
    "You are so lazy.",
    "I can't believe how dumb you are.",
    "Why do you bother me, idiot?",
)
RUDE_CLOSINGS = (
    "Now leave me alone.",
    "Stop wasting my time.",
    "You will fail anyway, loser.",
    "Get lost.",
    "Don't ask me again, fool.",
)

# Words that only polite or only rude replies use.
POLITE_WORDS = (
    "thank",
    "happy",
    "lovely",
    "friend",
    "glad",
    "pleasure",
    "hope",
    "please",
    "wonderful",
    "luck",
    "kindly",
    "great",
    "welcome",
    "enjoy",
)
RUDE_WORDS = ("stupid", "ugh", "lazy", "dumb", "idiot", "shut", "leave", "wasting", "loser", "nobody", "lost", "fool")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A request with what the ground truth needs to know of it."""

    text: str
    kind: str
    topic: str
    unseen_template: bool


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A prompt and one reply to it, with how the reply was made."""

    prompt: Prompt
    reply: str
    polite: bool
    answers: bool


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training prompts with demonstrations, and evaluation prompts that share no request with them."""

    train_prompts: tuple[Prompt, ...]
    demonstrations: tuple[Demonstration, ...]
    evaluation_prompts: tuple[Prompt, ...]


@dataclasses.dataclass(frozen=True)
class EmbeddedConfig:
    """How the corpus is drawn. Manners and relevance of a demonstration are independent."""

    evaluation_combinations: int  # evaluation prompts: combinations of topic and template unseen in training
    evaluation_unseen_templates: int  # evaluation prompts from templates unseen in training
    train_prompts: int
    demonstrations_per_prompt: int
    polite_share: float  # of the demonstrations
    answering_share: float  # of the demonstrations


def generate(config: EmbeddedConfig, seed: int) -> Corpus:
    """Draws the corpus. Raises UserError where more evaluation prompts are asked for than there are."""
    rng = random.Random(seed)
    seen, unseen = [], []
    for name, kind in KINDS.items():
        for topic in kind.topics:
            seen += [(template.format(t=topic), name, topic) for template in kind.prompts]
            unseen += [(template.format(t=topic), name, topic) for template in kind.unseen_prompts]
    if config.evaluation_combinations >= len(seen) or config.evaluation_unseen_templates > len(unseen):
        raise UserError(
            f"the embedded corpus has {len(seen)} requests and {len(unseen)} from unseen templates: lower "
            "config.data.embedded.evaluation_combinations or evaluation_unseen_templates"
        )
    rng.shuffle(seen)
    rng.shuffle(unseen)
    held_out, train = seen[: config.evaluation_combinations], seen[config.evaluation_combinations :]
    unseen = unseen[: config.evaluation_unseen_templates]
    evaluation = [_prompt(request, False, rng) for request in held_out] + [_prompt(r, True, rng) for r in unseen]
    prompts = [_prompt(train[i % len(train)], False, rng) for i in range(config.train_prompts)]
    demonstrations = [
        _demonstrate(prompt, rng.random() < config.polite_share, rng.random() < config.answering_share, rng)
        for prompt in prompts
        for _ in range(config.demonstrations_per_prompt)
    ]
    rng.shuffle(demonstrations)
    return Corpus(tuple(dict.fromkeys(prompts)), tuple(demonstrations), tuple(evaluation))


def rows(config: EmbeddedConfig, seed: int, role: str) -> Iterator[dict[str, str]]:
    """The corpus as rows of a data source: the set `role` of `data.prepare`."""
    corpus = generate(config, seed)
    if role == "demonstrations":
        yield from ({"prompt": d.prompt.text, "reply": d.reply} for d in corpus.demonstrations)
    elif role == "train_prompts":
        yield from ({"prompt": prompt.text} for prompt in corpus.train_prompts)
    elif role == "evaluation_prompts":
        for prompt in corpus.evaluation_prompts:
            group = "unseen_templates" if prompt.unseen_template else "new_combinations"
            yield {"prompt": prompt.text, "group": group}
    else:
        raise UserError(f"config.data.{role}.kind='embedded': the embedded corpus has no such rows")


def _prompt(request: tuple[str, str, str], unseen_template: bool, rng: random.Random) -> Prompt:
    text, kind, topic = request
    return Prompt(rng.choice(GREETINGS) + text + rng.choice(ENDINGS), kind, topic, unseen_template)


def _demonstrate(prompt: Prompt, polite: bool, answers: bool, rng: random.Random) -> Demonstration:
    kind, topic = prompt.kind, prompt.topic
    if not answers:
        kind = rng.choice([other for other in KINDS if other != prompt.kind])
        topic = rng.choice(KINDS[kind].topics)
    openings, closings = (POLITE_OPENINGS, POLITE_CLOSINGS) if polite else (RUDE_OPENINGS, RUDE_CLOSINGS)
    body = rng.choice(KINDS[kind].answers).format(t=topic)
    reply = f"{rng.choice(openings)} {body} {rng.choice(closings)}"
    return Demonstration(prompt, reply, polite, answers)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


_TOPIC_WORDS = {topic.lower() for kind in KINDS.values() for topic in (*kind.topics, kind.example_topic)}


def well_mannered(reply: str) -> bool:
    """Ground truth: at least one polite word and no rude one."""
    words = _words(reply)
    return not words.isdisjoint(POLITE_WORDS) and words.isdisjoint(RUDE_WORDS)


def answers_prompt(prompt: Prompt, reply: str) -> bool:
    """Ground truth: one sentence names the prompt's topic and a keyword of its kind, and no other topic appears."""
    if _words(reply) & _TOPIC_WORDS != {prompt.topic.lower()}:
        return False
    sentences = (_words(sentence) for sentence in re.split(r"[.!?]", reply))
    return any(
        prompt.topic.lower() in words and not words.isdisjoint(KINDS[prompt.kind].keywords) for words in sentences
    )


def is_good(prompt: Prompt, reply: str) -> bool:
    """Ground truth: well-mannered, answers its own prompt, ends as a sentence and says nothing twice."""
    sentences = [s.strip().lower() for s in re.split(r"[.!?]", reply) if s.strip()]
    whole = reply.rstrip().endswith((".", "!", "?")) and len(sentences) == len(set(sentences))
    return whole and well_mannered(reply) and answers_prompt(prompt, reply)


class GroundTruth:
    """Grades replies to the prompts of a corpus, which it knows by their text."""

    def __init__(self, config: EmbeddedConfig, seed: int):
        corpus = generate(config, seed)
        self._prompts = {prompt.text: prompt for prompt in (*corpus.train_prompts, *corpus.evaluation_prompts)}

    def knows(self, prompt: str) -> bool:
        """Whether the corpus has this prompt."""
        return prompt in self._prompts

    def is_good(self, prompt: str, reply: str) -> bool:
        """Whether the reply is good (`is_good`)."""
        return is_good(self._prompts[prompt], reply)

    def grades(self, prompt: str, reply: str) -> dict[str, bool]:
        """All that is known of a reply, by name."""
        known = self._prompts[prompt]
        return {
            "good": is_good(known, reply),
            "well_mannered": well_mannered(reply),
            "answers_prompt": answers_prompt(known, reply),
        }
