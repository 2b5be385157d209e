"""Demonstrations by a strong teacher instead of people: what of RLAIF's gain a better SFT would have given as well.

(Sharma et al., arXiv 2402.12366: much of it, where the teacher of SFT is weaker than the judge.)
"""

import pyarrow as pa

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import prompt_tokens, response_tokens
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_parquet, remove_folder, there, write_parquet
from rlaif_jax.sampling.continuous import Sampler
from rlaif_jax.sampling.stopping import make_stopping
from rlaif_jax.stages.replies import keep_rows, loaded_decoder
from rlaif_jax.stages.run import Run


def teacher_demonstrations(run: Run) -> dict[str, list]:
    """Columns `prompt` and `reply`, kept in `sft/data/teacher.parquet`: the teacher's replies to training prompts.

    Replies that reach their limit, or are too long for the policy, are left out. Raises UserError where none is left.
    """
    file = run.folder("sft") / "data" / "teacher.parquet"
    if not there(file):
        write_parquet(file, pa.table(_taught(run)))
        remove_folder(run.folder("sft") / "teacher")  # the shards of what the file now has
    return read_parquet(file).to_pydict()


def _taught(run: Run) -> dict[str, list]:
    config, policy = run.config.sft.teacher, run.config.policy
    prompts = run.data("train_prompts")["prompt"][: config.demonstrations]
    tokenizer = tokenizers.from_weights(config.weights)
    asked = prompt_tokens(tokenizer, [config.prompt.replace("{prompt}", prompt) for prompt in prompts])
    sampler, folder = _sampler(run, tokenizer), run.folder("sft") / "teacher"
    rows = keep_rows(sampler, tokenizer, asked, 1, run.key("teacher"), folder, config.commit_every)
    lengths = [len(tokens) for tokens in response_tokens(run.tokenizer(), [rows[i]["text"] for i in range(len(rows))])]
    usable = [i for i, length in enumerate(lengths) if rows[i]["ended"] and 0 < length < policy.max_response_length]
    print(f"teacher: {len(usable)} of {len(prompts)} replies are short enough to learn from", flush=True)
    if not usable:
        raise UserError(
            f"no reply of config.sft.teacher fits policy.max_response_length={policy.max_response_length}: make it "
            f"longer, or ask for shorter replies in sft.teacher.prompt"
        )
    return {"prompt": [prompts[i] for i in usable], "reply": [rows[i]["text"] for i in usable]}


def _sampler(run: Run, tokenizer) -> Sampler:
    config = run.config.sft.teacher
    model, parameters = loaded_decoder(run, config.weights, config.dtype)
    stopping, limit = make_stopping(tokenizer), config.max_new_tokens
    return Sampler(model, parameters, run.placement, stopping, config.sampling, limit, config.sampler)
