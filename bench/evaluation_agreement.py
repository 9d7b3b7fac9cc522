"""One folder evaluated three ways, by `vultus evaluate`, `POST /evaluate` and `vultus-train evaluate`, and compared.

    python bench/evaluation_agreement.py --data DATA --work /tmp/agreement

makes the folder from celebA_ir: a folder for each query person, each distractor person below strangers/; the photos are
padded by 40 px as `vultus-train prepare` does, and saved without loss as PNG. `--photos DIR` takes a folder as it is.
Every count must be the same, and so must every photo from which no face could be taken; it exits with 1 if not. WORK
holds photos of people: keep it private, and delete it afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import cv2
import httpx

from service.vision.image import decode_image
from training.data import Role, celeba_photos
from training.prepare import MAX_BYTES, MAX_PIXELS, TIGHT_PADDING

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6


def make_folder(data: Path, out: Path) -> None:
    """Write celebA_ir as a folder for `vultus evaluate`."""
    for photo in celeba_photos(data, [Role.QUERY, Role.DISTRACTOR]):
        folder = out / ("strangers" if photo.role is Role.DISTRACTOR else "") / photo.identity
        folder.mkdir(parents=True, exist_ok=True)
        image = decode_image((data / photo.file).read_bytes(), MAX_BYTES, MAX_PIXELS)
        pad = TIGHT_PADDING
        padded = cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        if not cv2.imwrite(str(folder / f"{Path(photo.file).stem}.png"), padded[:, :, ::-1]):
            raise SystemExit(f"{folder} cannot be written")


def command(module: str, *arguments: str | Path) -> None:
    """Run one of the project's commands; its progress goes on to standard error."""
    subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"VULTUS_THREADS": "2"},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def over_http(photos: Path, work: Path, form: dict[str, Any]) -> dict[str, Any]:
    """Send the folder as a ZIP to a service of its own, and return the answer."""
    archive = work / "photos.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(photos.rglob("*")):
            out.write(file, file.relative_to(photos))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"VULTUS_PORT": str(port), "VULTUS_DATA_DIR": str(work / "data"), "VULTUS_THREADS": "2"}
    with subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve"], cwd=ROOT, env=os.environ | settings
    ) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=3600) as client:
                for _ in range(600):
                    try:
                        if client.get("/readyz").status_code == 200:
                            break
                    except httpx.TransportError:
                        time.sleep(0.1)
                with archive.open("rb") as file:
                    answer = client.post("/evaluate", data=form, files={"archive": ("photos.zip", file)})
                if answer.status_code != 200:
                    raise SystemExit(answer.text)
                found: dict[str, Any] = answer.json()
                return found
        finally:
            server.terminate()


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Say where two answers differ: counts and texts exactly, rates and thresholds within 1e-6."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = sorted((first.keys() | second.keys()) - {"picture"})
        return [line for key in keys for line in differences(first.get(key), second.get(key), f"{path}.{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [
            line
            for i, pair in enumerate(zip(first, second, strict=True))
            for line in differences(*pair, f"{path}[{i}]")
        ]
    if isinstance(first, float) and isinstance(second, float):
        return [] if abs(first - second) <= TOLERANCE else [f"{path}: {first} and {second}"]
    return [] if first == second and type(first) is type(second) else [f"{path}: {first} and {second}"]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data set with celebA_ir")
    parser.add_argument("--photos", type=Path, help="a folder to take as it is instead")
    parser.add_argument("--work", type=Path, required=True, help="temporary folder; must not exist")
    parser.add_argument("--enrol", type=int, default=1)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True)
    photos = asked.photos
    if photos is None:
        photos = asked.work / "photos"
        make_folder(asked.data, photos)
    enrol = str(asked.enrol)
    command("service.cli", "evaluate", photos, "--enrol", enrol, "--out", asked.work / "vultus")
    crops, counted = asked.work / "crops", asked.work / "vultus-train.json"
    layout = ("--layout", "folders", "--role", "validation", "--like-service")
    command("training.cli", "prepare", "--data", photos, "--out", crops, *layout)
    command("training.cli", "evaluate", "--crops", crops, "--identification", "--enrol", enrol, "--json", counted)
    told = json.loads((asked.work / "vultus" / "report.json").read_text())
    ways = {"vultus-train evaluate": json.loads(counted.read_text()), "POST /evaluate": None}
    ways["POST /evaluate"] = over_http(photos, asked.work, {"enrol": enrol})
    (asked.work / "http.json").write_text(json.dumps(ways["POST /evaluate"]))
    print("| asked FPIR | threshold | false positives | FPIR | matches | mistaken | misses | FNIR |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for point in told["points"]:
        fpir, fnir = point["fpir"], point["fnir"]
        print(
            f"| {point['fpr']:g} | {point['threshold']:.4f} | {fpir['errors']:,} of {fpir['trials']:,} "
            f"| {fpir['rate']:.2%} ({fpir['low']:.2%}–{fpir['high']:.2%}) "
            f"| {point['matches']:,} | {point['mistaken']:,} "
            f"| {fnir['errors']:,} of {fnir['trials']:,} | {fnir['rate']:.1%} ({fnir['low']:.1%}–{fnir['high']:.1%}) |"
        )
    for use in ("enrolled", "probes", "strangers"):
        print(f"{use}: no face in {told[use]['failed']:,} of {told[use]['photos']:,} photos {told[use]['codes']}")
    print(f"enrolled {told['gallery_size']} of {told['people']}; wrong at rank 1: {told['rank1']['errors']}")
    wrong = False
    for name, other in ways.items():
        found = differences(told, other)
        wrong = wrong or bool(found)
        print(f"{name}: " + ("every count is the same" if not found else "\n  ".join(["differs", *found[:20]])))
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
