"""What answers look like, for the OpenAPI document; a test holds them to the models."""

from __future__ import annotations

from typing import Any

_FACE: dict[str, Any] = {
    "box": {"x": 200.71, "y": 240.27, "width": 269.36, "height": 389.48},
    "landmarks": {
        "left_eye": [255.87, 365.8],
        "right_eye": [373.26, 386.23],
        "nose": [285.85, 442.3],
        "mouth_left": [245.98, 503.1],
        "mouth_right": [348.5, 518.17],
    },
    "detection_score": 0.902,
    "quality": {"size": 269.4, "sharpness": 0.91, "yaw": -20.7, "pitch": 7.5, "roll": 6.9},
}
_POINT: dict[str, Any] = {"fpr": 0.01, "threshold": 0.894, "extrapolated": False}
_GALLERY: dict[str, Any] = {"model_id": "dlib-resnet", "gallery": "default"}
_FACE_ID = "ff52c50c-076c-484f-9cb0-87895c772626"
_CANDIDATE: dict[str, Any] = {"subject": "Ada", "face_id": _FACE_ID, "similarity": 0.968, "probability": 0.998}

ANSWERS: dict[str, dict[str, Any]] = {
    "DetectAnswer": {"faces": [_FACE]},
    "EmbedAnswer": {"model_id": "dlib-resnet", "faces": [{**_FACE, "embedding": [-0.0412, 0.0875, 0.0231]}]},
    "EnrollAnswer": {
        **_GALLERY,
        "subject": "Ada",
        "faces": [{**_FACE, "face_id": _FACE_ID}],
        "rejected": [{"index": 1, "code": "no_face", "detail": "No face was found in the photo"}],
    },
    "IdentifyAnswer": {
        **_GALLERY,
        "gallery_size": 2,
        "templates": 3,
        **_POINT,
        "faces": [
            {
                **_FACE,
                "decision": "match",
                "subject": "Ada",
                "similarity": 0.968,
                "margin": 0.133,
                "probability": 0.998,
                "candidates": [_CANDIDATE],
            }
        ],
    },
    "VerifyAnswer": {
        "match": True,
        "similarity": 0.968,
        "probability": 0.998,
        "model_id": "dlib-resnet",
        **_POINT,
        "face_a": _FACE,
        "face_b": _FACE,
        "face_id": None,
        "templates": 1,
    },
    "SearchSimilarAnswer": {
        **_GALLERY,
        "faces": [{**_FACE, "similar": [{"face_id": _FACE_ID, "subject": "Ada", "similarity": 0.968}]}],
    },
    "SearchUnknownAnswer": {
        **_GALLERY,
        "gallery_size": 2,
        "templates": 3,
        **_POINT,
        "group_threshold": 0.894,
        "photos": 3,
        "faces": 2,
        "rejected": [{"index": 2, "code": "no_face", "detail": "No face was found in the photo"}],
        "known": [
            {
                "subject": "Ada",
                "faces": [{"image_index": 0, "box": _FACE["box"], "best": {"subject": "Ada", "similarity": 0.968}}],
            }
        ],
        "unknown": [
            {
                "group": 0,
                "faces": [{"image_index": 1, "box": _FACE["box"], "best": {"subject": "Ada", "similarity": 0.812}}],
            }
        ],
    },
}


def example(model: str) -> dict[str, Any]:
    """Return OpenAPI's description of a successful answer of this model, with its example."""
    return {"content": {"application/json": {"example": ANSWERS[model]}}}
