"""`--config run.yaml`: the flags of a run as a file."""

import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hwnas.conditions import condition
from hwnas.job import LIMITS
from hwnas.recipes import Positive, first_error, recipe
from quant.errors import InvalidInput

Count = Annotated[int, Field(gt=0)]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e6 is a number, as in YAML 1.2 and on the command line."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class Config(BaseModel):
    """What a configuration file may say; a flag on the command line wins over it.

    `recipe` is a name, or a mapping with `name` and the fields that differ from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    space: str | None = None
    precisions: list[str] | None = None
    data: str | None = None
    image_size: Annotated[int, Field(ge=4)] | None = None
    device: str | None = None
    threads: Count | None = None
    batch: Count | None = None
    portable: bool | None = None
    method: str | None = None
    recipe: Any = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    limits: dict[str, Positive] = Field(default_factory=dict)
    fix: dict[str, str] = Field(default_factory=dict)
    tables: str | None = None
    run: str | None = None
    train_on: str | None = None


def read_config(path: Path) -> Config:
    """Read a file; raises InvalidInput with the path of the first field at fault."""
    try:
        content = _Loader(path.read_text(encoding="utf-8")).get_single_data()
        config = Config.model_validate({} if content is None else content)
    except OSError as error:
        raise InvalidInput(
            f"--config {path} cannot be read: {error.strerror}.", accepted="a YAML file"
        ) from error
    except ValidationError as error:
        unknown = error.errors()[0]["type"] == "extra_forbidden"
        raise InvalidInput(
            f"--config {path}: {first_error(error)}.",
            accepted=", ".join(Config.model_fields) if unknown else "",
        ) from error
    except (ValueError, yaml.YAMLError) as error:  # not UTF-8, not YAML, no date
        reason = " ".join(str(error).split())
        raise InvalidInput(f"--config {path} is not readable YAML: {reason}.") from error
    for name in config.limits:
        if name not in LIMITS and condition(name) is None:
            raise InvalidInput(
                f"--config {path}: limits.{name}: no such field.", accepted=", ".join(LIMITS)
            )
    if config.recipe is not None:
        if not isinstance(config.recipe, str | dict):
            raise InvalidInput(
                f"--config {path}: recipe: it is {config.recipe!r}.",
                accepted="a name, or a mapping with name and the fields that differ",
            )
        try:
            recipe(config.recipe)
        except InvalidInput as error:
            raise InvalidInput(
                f"--config {path}: {error.what}",
                accepted=error.accepted,
                next_step=error.next_step,
            ) from error
    return config
