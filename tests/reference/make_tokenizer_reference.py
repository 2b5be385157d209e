"""Makes the tokenizers that tests/data/test_gguf_tokenizers.py rebuilds, and what they make of texts.

Every figure comes from SentencePiece, none from rlaif_jax:

    python3 -m venv /tmp/peer
    /tmp/peer/bin/pip install sentencepiece==0.2.3
    /tmp/peer/bin/python tests/reference/make_tokenizer_reference.py
"""

import io
import json
import pathlib

FOLDER = pathlib.Path(__file__).parent

CORPUS = (
    "How are you today? I am fine, thank you. How do I cook rice? Wash the rice and boil it in water for 12 minutes.",
    "The capital of France is Paris, and the capital of Italy is Rome. In 2024 it rained on 117 of 366 days.",
    "    def area(width, height):\n        return width * height\n\nprint(area(3, 4))  # twelve",
    "Le café est fermé; naïve façade. Übung macht den Meister. 東京 の 天気 は 晴れ です。 こんにちは 世界",
    "don't, you'll, it's (fine)! \"quoted\" text: a-b_c/d\n\nuser\nmodel\n\n\nuser: hello\nmodel: hello there",
    "<b>bold</b> <i>slanted</i> <u>underlined</u>",
)
TEXTS = (
    "",
    " ",
    "How are you today?",
    " leading and trailing ",
    "two  spaces,   three,    four,     five",
    "     ",
    "In 2024 I paid 1234567.89 for 10 apples",
    "naïve café 東京 Ω",
    "smile 🙂 and 👩‍👩‍👧 family",
    "e\u0301 is not é",
    "two\n\nnewlines\n\n\n\ttab\r\n",
    "\nfirst",
    "don't, you'll; it's (fine)!",
    "def area(width):\n        return width\n",
    "aaaaaaaaa bbbb ____ ------",
    "THE CAPITAL OF FRANCE",
    "a▁b",
    "a\u00a0b\u3000c",
    "<0x0A> is a byte in angle brackets",
)
# What users write of role tokens is text.
SPELLED = ("<s>How are you?</s>", "a</s>b <unk> c", "</s", "<s><s>")
TURNS = ("<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\n", "a <end_of_turn>  b<end_of_turn>")

TRAINING = {
    "vocab_size": 500,
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "character_coverage": 0.999,
}
# As Llama 2 and Mistral have it, and as Gemma has it.
KINDS = {
    "llama": {"add_dummy_prefix": True},
    "gemma": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁"],
    },
}


def tokenizer_reference(kind):
    """Tokens, scores and types of a small model, in GGUF's terms, and the token ids of texts."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, minloglevel=2, **TRAINING, **KINDS[kind]
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    defined = KINDS[kind].get("user_defined_symbols", [])

    def token_type(index):
        found = (processor.is_unknown, processor.is_control, lambda i: processor.id_to_piece(i) in defined)
        types = (2, 3, 4, 5, 6)  # gguf.TokenType: unknown, control, user-defined, unused, byte
        return next(
            (
                t
                for t, holds in zip(types, (*found, processor.is_unused, processor.is_byte), strict=True)
                if holds(index)
            ),
            1,
        )

    indices = range(processor.vocab_size())
    texts = (*TEXTS, *TURNS) if defined else TEXTS
    return {
        "add_space_prefix": KINDS[kind]["add_dummy_prefix"],
        "tokens": [processor.id_to_piece(i) for i in indices],
        "scores": [processor.get_score(i) for i in indices],
        "types": [token_type(i) for i in indices],
        "strings": [{"text": text, "ids": processor.encode(text)} for text in texts],
        "spelled": [{"text": text, "ids": processor.encode(text)} for text in SPELLED],
    }


def main():
    """Writes the reference file beside this script."""
    reference = {kind: tokenizer_reference(kind) for kind in KINDS}
    lines = json.dumps(reference, ensure_ascii=False) + "\n"
    (FOLDER / "sentencepiece_tokenizers.json").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
