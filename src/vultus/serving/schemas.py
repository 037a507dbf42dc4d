"""Requests and responses of the HTTP API as pydantic models: they check requests and give the OpenAPI document.

Class names are the component names of the OpenAPI document, from which clients are generated.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from vultus._ranges import STRENGTHS
from vultus.sampling.photos import WhichFace

Format = Literal["png", "webp", "jpeg", "npy"]
MAX_SEED = 2**53 - 1  # largest integer that JavaScript represents exactly
MAX_ENTRY = 1e6  # absolute value of an embedding's entry; those of FaceNet are below 1
MAX_STEPS = 240  # as in `vultus generate`


def _whole(value: Any) -> Any:
    """Accept 10.0 as an integer, as JSON Schema does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Seed = Annotated[
    int, Field(ge=0, le=MAX_SEED, description="of noise and random people; the same seed gives the same faces"), WHOLE
]
Strength = Annotated[
    float,
    Field(
        ge=STRENGTHS.least,
        le=STRENGTHS.most,
        description="factor on the noise; below 1 the faces are less varied and closer to the average",
    ),
]


Start = Annotated[
    int,
    Field(
        ge=0,
        le=MAX_SEED,
        description="number of the first embedding or person; the noise of a face depends on the seed, this number and "
        "the variant",
    ),
    WHOLE,
]
WhichFaces = Annotated[
    WhichFace, Field(description="of several faces in a photo: the largest, the one nearest to the centre, or all")
]


class Strict(BaseModel):
    """Unknown names are errors; a misspelt option would otherwise be ignored silently."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """Every error of the API."""

    detail: Annotated[str, Field(description="one line: what is wrong, and the remedy")]


class Similarity(BaseModel):
    """Similarity of a generated face to its source; null where it is not available."""

    facenet: Annotated[
        float | None, Field(description="cosine of FaceNet's embedding of the face and the given embedding")
    ]
    dlib: Annotated[
        float | None, Field(description="minus the distance of dlib's descriptors of the face and of the photo")
    ]


class Face(BaseModel):
    """One face."""

    index: Annotated[int, Field(description="number of the embedding, random person or step")]
    variant: Annotated[int, Field(description="index of the noise")]
    seed: int
    image: Annotated[str, Field(description="the image file as a data: URI")]
    similarity: Similarity | None = None
    embedding: Annotated[list[float] | None, Field(description="for random people, and the mean with weights")] = None


class Faces(BaseModel):
    """Several faces, or one with additional information."""

    model: str
    faces: list[Face]
    note: Annotated[str | None, Field(description="a remark on the photo, for instance that it shows two faces")] = None


class PhotoFace(BaseModel):
    """A face in a photo."""

    embedding: list[float]
    crop: Annotated[str, Field(description="the part of the photo that FaceNet reads, as a data: URI")]
    box: Annotated[
        tuple[float, float, float, float] | None,
        Field(description="left, top, right, bottom in pixels of the upright photo; null if faces were not detected"),
    ]


class Embedding(BaseModel):
    """FaceNet's embedding of a photo; `embedding` and `crop` are those of the first of `faces`."""

    embedding: list[float]
    crop: str
    faces: Annotated[list[PhotoFace], Field(description="the chosen face, or all of them, the largest first")]
    faces_found: Annotated[
        int | None, Field(description="null if faces were not detected (the extra `align` is not installed)")
    ]
    note: str | None = None


class Part(BaseModel):
    """Whether a feature is available, or what is missing and the remedy."""

    available: bool
    missing: str | None = None


class Photos(Part):
    """Whether photos can be embedded."""

    aligned: Annotated[bool, Field(description="faces are detected and aligned; otherwise the centre square is used")]
    note: str | None = None


class Range(BaseModel):
    """Similarities of real photo pairs: 5th percentile, mean, 95th percentile."""

    low: float
    mean: float
    high: float


class Scale(Part):
    """One similarity measure, and its range for pairs of real photos."""

    measure: Literal["cosine", "minus euclidean distance"]
    same_person: Range
    different_people: Range


class Edit(BaseModel):
    """An attribute that can be edited."""

    name: str
    meaning: Annotated[str, Field(description="what a larger value means")]
    costs: Annotated[
        dict[str, str], Field(description="by strength: what the edit changed and cost when it was measured, in words")
    ]


class Limits(BaseModel):
    """Limits of a request."""

    faces: int
    body_bytes: int
    megapixels: float
    queue: Annotated[int, Field(description="faces that may wait or be in progress, over all requests")]
    seconds: float


class Model(BaseModel):
    """The model that is served."""

    id: str
    resolution: int
    c_dim: int
    z_dim: int
    encoder: Annotated[str | None, Field(description="the face encoder whose embeddings the model takes")]
    licence: str | None
    formats: list[Format]
    photos: Photos
    random: Part
    edits: list[Edit]
    similarity: dict[Literal["facenet", "dlib"], Scale]
    limits: Limits


class PhotoOptions(Strict):
    """Query parameters of /v1/embeddings."""

    face: WhichFaces = "largest"


def request_models(
    c_dim: int, max_faces: int, attributes: Sequence[str] = ()
) -> tuple[type[Any], type[Any], type[Any], type[Any]]:
    """Models of requests for embeddings of `c_dim` numbers and at most `max_faces` faces.

    `attributes` are those that can be edited.

    Returns (options of /v1/faces as query parameters, the same with embeddings as JSON, body of /v1/between, query
    parameters of /v1/random).
    """
    number: Any = Annotated[float, Field(ge=-MAX_ENTRY, le=MAX_ENTRY, allow_inf_nan=False)]
    not_all_zeros: dict[str, Any] = {"contains": {"not": {"const": 0}}}  # checked by payloads.unit_rows
    vector: Any = Annotated[list[number], Field(min_length=c_dim, max_length=c_dim, json_schema_extra=not_all_zeros)]
    vectors: Any = Annotated[list[vector], Field(min_length=1, max_length=max_faces)]
    max_steps = max(2, min(max_faces, MAX_STEPS))
    steps: Any = Annotated[int, Field(ge=2, le=max_steps), WHOLE]

    def count(description: str) -> Any:
        return Annotated[int, Field(ge=1, le=max_faces, description=description), WHOLE], 1

    weight: Any = Annotated[float, Field(ge=0, le=MAX_ENTRY, allow_inf_nan=False)]
    weights: Any = Annotated[
        list[weight],
        Field(
            min_length=1,
            max_length=max_faces,
            description="a weight of each embedding: the faces are of the weighted mean of all, normalised",
            json_schema_extra=not_all_zeros,
        ),
    ]
    one_edit = f"({'|'.join(attributes)})=[+-]?[0-3](\\.[0-9]{{1,4}})?"
    edit: Any = Annotated[
        str,
        Field(
            pattern=f"^({one_edit}(,{one_edit})*)?$" if attributes else "^$",
            max_length=400,
            description="attributes that are changed, as in smile=1.5,pitch=-1, in standard deviations",
        ),
    ]
    noise: dict[str, Any] = {"seed": (Seed, 0), "noise_strength": (Strength, 1.0), "edit": (edit, "")}
    images: dict[str, Any] = noise | {"format": (Format, "png")}
    similarity: Any = Annotated[bool, Field(description="also return the similarity of each face to its source")]
    of_embeddings: dict[str, Any] = images | {"num": count("faces of each embedding"), "start": (Start, 0)}
    of_embeddings |= {"similarity": (similarity, False), "face": (WhichFaces, "largest")}
    of_two: dict[str, Any] = noise | {"a": (vector, ...), "b": (vector, ...)}
    of_two |= {"steps": (steps, min(9, max_steps)), "format": (Literal["png", "webp", "jpeg"], "png")}
    of_random: dict[str, Any] = images | {"num": count("people who do not exist"), "start": (Start, 0)}
    options: Any = create_model("Options", __base__=Strict, **of_embeddings)
    faces: Any = create_model(
        "FacesRequest", __base__=options, embeddings=(vectors, ...), weights=(weights | None, None)
    )
    between: Any = create_model("BetweenRequest", __base__=Strict, **of_two)
    random: Any = create_model("RandomOptions", __base__=Strict, **of_random)
    return options, faces, between, random


def one_line(error: ValidationError) -> str:
    """The first validation error as "path: message", without the values that were sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"] if part not in ("query", "body"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path}: {first['msg']}{more}" if path else f"{first['msg']}{more}"
