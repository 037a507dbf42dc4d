"""What the HTTP API takes and gives, as pydantic models: they check requests and write the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

Format = Literal["png", "webp", "jpeg", "npy"]
MAX_SEED = 2**53 - 1  # JavaScript's numbers are exact so far
LARGEST = 1e6  # entry of an embedding; those of FaceNet are below 1
MAX_STEPS = 240  # as in generate.py


def _whole(value: Any) -> Any:
    """10.0 is a whole number in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, description="of the noise; the same seed gives the same faces"), WHOLE]
Strength = Annotated[
    float, Field(ge=0, le=4, description="the noise is multiplied by it; below 1 faces are nearer to the average")
]


class Strict(BaseModel):
    """Unknown names are an error; a slip in a name would else be a setting that does nothing."""

    model_config = ConfigDict(extra="forbid")


class Problem(BaseModel):
    """Every error of the API."""

    detail: Annotated[str, Field(description="one line: what is wrong, and the remedy")]


class Similarity(BaseModel):
    """How alike a face is to what it was made of; null where it can't be said."""

    facenet: Annotated[float | None, Field(description="cosine of FaceNet's embedding to the one asked for")]
    dlib: Annotated[float | None, Field(description="minus the distance of dlib's embedding to that of the photo")]


class Face(BaseModel):
    """One face."""

    index: Annotated[int, Field(description="of the embedding, person or step")]
    variant: Annotated[int, Field(description="of the noise")]
    seed: int
    image: Annotated[str, Field(description="a data: address that holds the picture")]
    similarity: Similarity | None = None
    embedding: Annotated[list[float] | None, Field(description="of a random person")] = None


class Faces(BaseModel):
    """Several faces, or one with what is known of it."""

    model: str
    faces: list[Face]
    note: Annotated[str | None, Field(description="what the user should know of the photo")] = None


class Embedding(BaseModel):
    """What FaceNet makes of a photo."""

    embedding: list[float]
    crop: Annotated[str, Field(description="a data: address of the part of the photo that FaceNet read")]
    faces_found: Annotated[int | None, Field(description="null where nobody looked (the extra `align` is missing)")]
    note: str | None = None


class Part(BaseModel):
    """Whether something can be done here, or what is missing and how to get it."""

    available: bool
    missing: str | None = None


class Photos(Part):
    """Whether photos can be read."""

    aligned: Annotated[bool, Field(description="the face is found and aligned; else the centre square is taken")]
    note: str | None = None


class Range(BaseModel):
    """Scores of real pairs: 5th percentile, mean, 95th percentile."""

    low: float
    mean: float
    high: float


class Scale(Part):
    """One similarity, and what it is between real photos."""

    measure: Literal["cosine", "minus euclidean distance"]
    same_person: Range
    different_people: Range


class Limits(BaseModel):
    """What one request may ask for."""

    faces: int
    body_bytes: int
    megapixels: float
    queue: Annotated[int, Field(description="faces that may wait, of all requests")]
    seconds: float


class Model(BaseModel):
    """The model that is served."""

    id: str
    resolution: int
    c_dim: int
    z_dim: int
    encoder: Annotated[str | None, Field(description="whose embeddings it takes")]
    licence: str | None
    formats: list[Format]
    photos: Photos
    random: Part
    similarity: dict[Literal["facenet", "dlib"], Scale]
    limits: Limits


def requests(c_dim: int, most: int) -> tuple[type[Any], type[Any], type[Any], type[Any]]:
    """Models of requests for embeddings of `c_dim` numbers and at most `most` faces.

    Returns (options of /v1/faces as query parameters, the same with embeddings as JSON, body of /v1/between, query
    parameters of /v1/random).
    """
    number: Any = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
    not_zero: dict[str, Any] = {"contains": {"not": {"const": 0}}}  # unit_rows checks it
    vector: Any = Annotated[list[number], Field(min_length=c_dim, max_length=c_dim, json_schema_extra=not_zero)]
    vectors: Any = Annotated[list[vector], Field(min_length=1, max_length=most)]
    most_steps = max(2, min(most, MAX_STEPS))
    steps: Any = Annotated[int, Field(ge=2, le=most_steps), WHOLE]

    def count(what: str) -> Any:
        return Annotated[int, Field(ge=1, le=most, description=what), WHOLE], 1

    noise: dict[str, Any] = {"seed": (Seed, 0), "noise_strength": (Strength, 1.0)}
    pictures: dict[str, Any] = noise | {"format": (Format, "png")}
    similarity: Any = Annotated[bool, Field(description="tell how alike the faces are to what they are of")]
    of_embeddings: dict[str, Any] = pictures | {"num": count("faces of each embedding")}
    of_embeddings["similarity"] = (similarity, False)
    of_two: dict[str, Any] = noise | {"a": (vector, ...), "b": (vector, ...)}
    of_two |= {"steps": (steps, min(9, most_steps)), "format": (Literal["png", "webp", "jpeg"], "png")}
    of_nobody: dict[str, Any] = pictures | {"num": count("people who do not exist")}
    options: Any = create_model("Options", __base__=Strict, **of_embeddings)
    faces: Any = create_model("FacesRequest", __base__=options, embeddings=(vectors, ...))
    between: Any = create_model("BetweenRequest", __base__=Strict, **of_two)
    random: Any = create_model("RandomOptions", __base__=Strict, **of_nobody)
    return options, faces, between, random


def one_line(error: ValidationError) -> str:
    """The first thing that is wrong: where, and what. Without the values that were sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in ("query", "body"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {first['msg']}{more}" if place else f"{first['msg']}{more}"
