"""What sweep files share."""

from types import ModuleType

from rlaif_jax.config import flatten, parse


def changes(module: ModuleType, arm: str, other: str) -> dict:
    """The fields in which a config's arm "ARM,OTHER" differs from its arm ARM."""
    base, changed = (flatten(parse(module.get_config(name).to_dict())) for name in (arm, f"{arm},{other}"))
    fields = {name: value for name, value in changed.items() if base.get(name) != value}
    if any(name.startswith("panel.judges.") for name in fields):  # members come and go as a whole
        fields = {name: value for name, value in fields.items() if not name.startswith("panel.judges.")}
        fields["panel.judges"] = module.get_config(f"{arm},{other}").panel.judges.to_dict()
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
