"""TensorFlow Datasets of ours, stored as array_record, so that neither preparing nor reading needs TensorFlow.

    python -m rlaif_jax.data.tfds_builders BUILDER RAW_FOLDER DATA_DIR

prepares one from JSON-lines files: RAW_FOLDER holds SPLIT.jsonl or SPLIT.jsonl.gz with the fields of the builder.
"""

import sys

import tensorflow_datasets as tfds
from etils import epath

from rlaif_jax.data.sources import Malformed, SourceConfig, read
from rlaif_jax.errors import UserError


class _TextBuilder(tfds.core.GeneratorBasedBuilder):
    """Rows of texts."""

    VERSION = tfds.core.Version("1.0.0")
    FIELDS: tuple[str, ...] = ()
    raw_folder = ""

    def __init__(self, **kwargs):
        super().__init__(**{"file_format": "array_record"} | kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(dict.fromkeys(self.FIELDS, tfds.features.Text()))
        return tfds.core.DatasetInfo(builder=self, features=features, description=self.__doc__)

    def _split_generators(self, dl_manager):
        found = {file.name.split(".")[0]: file for file in sorted(epath.Path(self.raw_folder).glob("*.jsonl*"))}
        if not found:
            raise UserError(f"no SPLIT.jsonl or SPLIT.jsonl.gz in {self.raw_folder}")
        return {split: self._generate_examples(file) for split, file in found.items()}

    def _generate_examples(self, file: epath.Path):
        source = SourceConfig("jsonl", file.name, "", "", dict(zip(self.FIELDS, self.FIELDS, strict=True)), 0)
        for index, row in enumerate(read(source, str(file.parent))):
            if isinstance(row, Malformed):
                raise UserError(f"{file}, row {index}: {row.reason}")
            yield index, row


class RlaifTldr(_TextBuilder):
    """Reddit posts with their authors' TL;DR."""

    FIELDS = ("subreddit", "title", "post", "summary")


class RlaifHh(_TextBuilder):
    """Dialogues of HH-RLHF with a chosen and a rejected reply."""

    FIELDS = ("prompt", "chosen", "rejected")


BUILDERS = {"rlaif_tldr": RlaifTldr, "rlaif_hh": RlaifHh}


def prepare(name: str, raw_folder: str, data_dir: str) -> None:
    """Writes the TFDS set `name` to `data_dir` from the files in `raw_folder`. Raises UserError for a bad row."""
    if name not in BUILDERS:
        raise UserError(f"no TFDS builder {name!r}; there are {', '.join(BUILDERS)}")
    builder = BUILDERS[name](data_dir=data_dir)
    builder.raw_folder = raw_folder
    builder.download_and_prepare()


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        if len(argv) != 4:
            raise UserError("usage: python -m rlaif_jax.data.tfds_builders BUILDER RAW_FOLDER DATA_DIR")
        prepare(*argv[1:])
    except UserError as error:
        print(f"rlaif_jax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
