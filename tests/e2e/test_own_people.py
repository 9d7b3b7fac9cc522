"""What a gallery's own people do to its thresholds, over HTTP."""

from __future__ import annotations

from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from service.calibration import Calibration
from service.settings import BUNDLED_MODELS
from tests.e2e.test_keys import make_key
from tests.support import Server, photo

SHIPPED = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")


def looks(count: int) -> list[bytes]:
    """One face in so many slightly different photos: people who look much more alike than the model expects."""
    image = cv2.imdecode(np.frombuffer(photo("obama.jpg"), np.uint8), cv2.IMREAD_COLOR)
    found = []
    for light in np.linspace(0.7, 1.0, count):
        _, encoded = cv2.imencode(".jpg", np.clip(image * light, 0, 255).astype(np.uint8))
        found.append(encoded.tobytes())
    return found


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.json"
    return {role: make_key(file, role, role) for role in ("write", "admin")}


def test_own_people_raise_the_threshold_and_only_an_admin_lets_them_lower_it(
    tmp_path: Path, keys: dict[str, str]
) -> None:
    with Server(tmp_path / "data", key=keys["write"], VULTUS_API_KEYS_FILE=str(tmp_path / "keys.json")) as server:

        def point() -> dict[str, object]:
            found: dict[str, object] = server.client.get("/operating-points?fpr=0.1").json()["identification"]
            return found

        empty = point()
        assert (empty["basis"], empty["model_identities"], empty["gallery_identities"]) == ("model", 100, 0)
        for number, data in enumerate(looks(6)):
            server.enroll(f"P{number}", data, allow_conflict="true")
        raised = point()
        model = SHIPPED.identification_point(0.1, 6, 6).threshold
        assert (raised["basis"], raised["gallery_identities"]) == ("both", 6)
        assert isinstance(raised["threshold"], float) and raised["threshold"] > model
        # The searches use it, and a restart changes nothing.
        assert server.identify("biden.jpg", fpr=0.1)["threshold"] == raised["threshold"]
        server.stop()
        server.start()
        assert point() == raised
        # Removal undoes addition.
        server.enroll("somebody", "biden.jpg", allow_conflict="true")
        assert point() != raised
        assert server.client.delete("/subjects/somebody").status_code == 204
        assert point() == raised
        # Who enrols must not choose.
        body = {"own_calibration": "full"}
        refused = server.client.patch("/galleries/default", json=body)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert server.client.get("/galleries/default").json()["own_calibration"] == "stricter"
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {keys['admin']}"}) as admin:
            assert admin.patch("/galleries/default", json=body).json()["own_calibration"] == "full"
            assert admin.patch("/galleries/none", json=body).json()["code"] == "gallery_not_found"
            unknown = admin.patch("/galleries/default", json={"own_calibration": "off"})
            assert unknown.json()["code"] == "invalid_request"
        assert server.client.get("/galleries/default").json()["own_calibration"] == "full"


def test_few_people_leave_the_models_threshold(server: Server) -> None:
    for name in ("obama.jpg", "biden.jpg", "astronaut.png"):
        server.enroll(name, name, allow_conflict="true")
    before = server.client.get("/operating-points?fpr=0.1").json()["identification"]
    assert before["threshold"] == SHIPPED.identification_point(0.1, 3, 3).threshold
    server.client.patch("/galleries/default", json={"own_calibration": "full"}).raise_for_status()
    assert server.client.get("/operating-points?fpr=0.1").json()["identification"] == before
