"""Requests for faces in the forms of the JSON files that `vultus embed` and the page write."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, GetJsonSchemaHandler, create_model, model_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import CoreSchema

from vultus.sampling.embedding_rows import HEADER

FORMS = ("embeddings", "embedding", "faces")  # rows; one row, as the page saves it; objects with a row, as `embed` does


def reads_saved_files(request: type[BaseModel], encoder: str | None) -> type[BaseModel]:
    """The model of a request that also takes `embedding` or `faces` in the place of `embeddings`.

    `encoder` is the id of the encoder that the model was trained with, if it is known; a file of another one is
    refused.
    """

    class Saved(BaseModel):
        @model_validator(mode="before")
        @classmethod
        def _rows(cls, value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            value = dict(value)
            held = value.pop("encoder", None)
            if not isinstance(held, str | None):
                raise PydanticCustomError("encoder", "encoder: the id of a face encoder is text")
            if held is not None and encoder is not None and held != encoder:
                raise PydanticCustomError(
                    "encoder",
                    "the embeddings are those of {held}, but this model takes those of {encoder}",
                    {"held": held[:60], "encoder": encoder},
                )
            if not isinstance(value.pop(HEADER, {}), dict):
                raise PydanticCustomError("header", "vultus: an object is needed")
            given = [form for form in FORMS if form in value]
            if len(given) > 1:
                raise PydanticCustomError("forms", "give only one of {forms}", {"forms": ", ".join(given)})
            if given == ["embedding"]:
                value["embeddings"] = [value.pop("embedding")]
            if given == ["faces"]:
                faces = value.pop("faces")
                rows = isinstance(faces, list) and all(isinstance(face, dict) for face in faces)
                value["embeddings"] = [face.get("embedding") for face in faces] if rows else None
            return value

        @classmethod
        def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
            schema = handler.resolve_ref_schema(handler(core))
            others = {name: value for name, value in schema["properties"].items() if name != "embeddings"}
            others["encoder"] = {"type": ["string", "null"]} if encoder is None else {"enum": [encoder, None]}
            others[HEADER] = {"type": "object", "description": "the header of a file of `vultus embed`; not used"}
            rows = schema["properties"]["embeddings"]
            face = {"type": "object", "properties": {"embedding": rows["items"]}, "required": ["embedding"]}
            forms = zip(FORMS, (rows, rows["items"], rows | {"items": face}), strict=True)
            return {
                "anyOf": [
                    schema | {"properties": others | {name: form}, "required": [name], "title": f"Faces of {name}"}
                    for name, form in forms
                ]
            }

    model: type[BaseModel] = create_model(request.__name__, __base__=(Saved, request))
    return model
