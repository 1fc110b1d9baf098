"""What one sample of a data set is: shape, variables and the values they take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from distpc.errors import ArtifactError

DATASET = "dataset.json"
"""The file of a data set's description, beside its shards."""
MISSING = -1
"""Integer that marks a missing value; real columns use NaN."""


@dataclass(frozen=True)
class DatasetSpec:
    """Describes the samples of a set of shards; written beside them as dataset.json.

    Attributes:
        name: the data set's name for reports.
        kind: image, text or array.
        num_variables: V, values in a sample.
        num_categories: values of each variable are 0 .. n - 1; None for a real column. Length V.
        image_shape: (height, width, channels) for images; variables run in that order, channel
            fastest.
        columns: names of the columns of an array, else empty.
        color: colour space of the values as the loader gives them.
        has_missing: whether samples may miss values (MISSING in integer, NaN in real columns).
        tokens: what the values of text are: bytes of UTF-8, characters, or tokens of a vocabulary.
        tokenizer: digest of the tokenizer that made text's values; empty for bytes.
        end_token: the value that ends a document; None where none does.
    """

    name: str
    kind: Literal["image", "text", "array"]
    num_variables: int
    num_categories: tuple[int | None, ...]
    image_shape: tuple[int, int, int] | None = None
    columns: tuple[str, ...] = ()
    color: str = "as_is"
    has_missing: bool = False
    tokens: Literal["bytes", "characters", "tokens"] = "bytes"
    tokenizer: str = ""
    end_token: int | None = None

    @property
    def is_discrete(self) -> bool:
        """Whether every variable is categorical (samples are integers)."""
        return all(count is not None for count in self.num_categories)

    @property
    def unit(self) -> str:
        """Of the report's figure: bpd (per dimension), bpc (character) or bpt (token)."""
        if self.kind != "text":
            return "bpd"
        return "bpt" if self.tokens == "tokens" else "bpc"

    @property
    def caveat(self) -> str:
        """What has to stand beside every figure of these data; empty where nothing has to.

        Lossy YCoCg gives several colours one value: fewer bits are needed than for the pictures.
        """
        if self.color == "ycocg_lossy":
            return "of lossy colours (YCoCg, rounded): not comparable with figures of RGB"
        return ""

    @property
    def counted(self) -> Literal["characters", "values"]:
        """What a likelihood is divided by: characters of UTF-8 bytes, else the values there are."""
        is_bytes = self.kind == "text" and self.tokens == "bytes"
        return "characters" if is_bytes else "values"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DatasetSpec:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: the values describe no data set.
        """
        try:
            shape = value["image_shape"]
            return cls(
                **{
                    **value,
                    "num_categories": tuple(value["num_categories"]),
                    "image_shape": None if shape is None else tuple(shape),
                    "columns": tuple(value["columns"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                "a data set's description has other fields than this code reads",
                found=f"{type(error).__name__}: {error}",
                expected=", ".join(field.name for field in fields(cls)),
                fix="use the distpc that wrote it, or remove the folder and run the stage again",
            ) from error

    def save(self, folder: Path) -> None:
        """Write dataset.json into `folder`."""
        # Here, not above: circuits are used with specs where no pydantic is, which the package
        # distpc.artifacts needs.
        from distpc.artifacts.files import write_json

        write_json(folder / DATASET, self.to_json())

    @classmethod
    def load(cls, folder: Path) -> DatasetSpec:
        """Read dataset.json from `folder`."""
        from distpc.artifacts.files import read_json

        return cls.from_json(read_json(folder / DATASET))
