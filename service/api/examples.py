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

_ESTIMATE: dict[str, Any] = {
    "rate": 0.008,
    "errors": 8,
    "trials": 1000,
    "people": 500,
    "people_in_error": 6,
    "low": 0.002,
    "high": 0.017,
    "supported": False,
    "note": "Only 6 of 500 people were taken for somebody: with fewer than 30, the rate may be off by more than 30 %.",
}

ANSWERS: dict[str, dict[str, Any]] = {
    "DetectAnswer": {"faces": [_FACE]},
    "EmbedAnswer": {"model_id": "dlib-resnet", "faces": [{**_FACE, "embedding": [-0.0412, 0.0875, 0.0231]}]},
    "EnrollAnswer": {
        **_GALLERY,
        "subject": "Ada",
        "faces": [{**_FACE, "face_id": _FACE_ID}],
        "rejected": [{"index": 1, "code": "no_face", "detail": "No face was found in the photo"}],
    },
    "EnrollBatchAnswer": {
        **_GALLERY,
        "faces": 5,
        "people": [
            {
                "subject": "Ada",
                "faces": 5,
                "rejected": [{"file": "Ada/3.jpg", "code": "no_face", "detail": "No face was found in the photo"}],
                "conflicts": [],
            },
            {
                "subject": "Ada L.",
                "faces": 0,
                "rejected": [],
                "conflicts": [
                    {
                        "file": "Ada L./1.jpg",
                        "subject": "Ada",
                        "face_id": _FACE_ID,
                        "similarity": 0.968,
                        "threshold": 0.894,
                    }
                ],
            },
        ],
        "ignored": 0,
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
    "EvaluateAnswer": {
        "model_id": "dlib-resnet",
        "enrol": 1,
        "resamples": 200,
        "people": 100,
        "gallery_size": 100,
        "templates": 100,
        "stranger_people": 500,
        "enrolled": {"photos": 100, "failed": 0, "codes": {}},
        "probes": {"photos": 400, "failed": 1, "codes": {"no_face": 1}},
        "strangers": {"photos": 1000, "failed": 0, "codes": {}},
        "ignored": 0,
        "rank1": _ESTIMATE,
        "points": [{**_POINT, "fpir": _ESTIMATE, "fnir": _ESTIMATE, "matches": 372, "mistaken": 1}],
        "pairs": [
            {
                **_POINT,
                "fmr": 0.009,
                "false_matches": 5580,
                "impostor_pairs": 620_000,
                "fnmr": 0.05,
                "false_non_matches": 50,
                "genuine_pairs": 1000,
            }
        ],
        "groups": [{"group": "gate 1", "fpr": 0.01, "fpir": _ESTIMATE, "fnir": _ESTIMATE}],
        "det": [{"threshold": 0.894, "fpir": 0.008, "fnir": 0.07}],
        "failures": [{"file": "Ada/7.jpg", "use": "probe", "code": "no_face"}],
        "notes": [],
        "picture": None,
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
