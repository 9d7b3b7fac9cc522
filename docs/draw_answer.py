"""Draw what a running service answers about a photo onto that photo: the picture in the README.

    python docs/draw_answer.py http://127.0.0.1:8000 docs/answer.jpg

It enrols obama.jpg and biden.jpg of tests/images in a gallery of its own, puts four other photos onto one sheet, and
asks who is there. Set VULTUS_KEY where the service wants a key.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import httpx
from PIL import Image, ImageDraw, ImageFont, ImageOps

IMAGES = Path(__file__).resolve().parent.parent / "tests" / "images"
ENROLLED = {"Barack Obama": "obama.jpg", "Joe Biden": "biden.jpg"}
ASKED = ["obama2.jpg", "astronaut.png", "biden.jpg", "obama3.jpg"]
TILE = 480
GALLERY = "readme-picture"
COLOURS = {"match": "#1a7f37", "unknown": "#9a6700"}


def sheet() -> Image.Image:
    """Return the photos side by side."""
    whole = Image.new("RGB", (TILE * len(ASKED), TILE), "white")
    for number, name in enumerate(ASKED):
        tile = ImageOps.fit(Image.open(IMAGES / name).convert("RGB"), (TILE, TILE), centering=(0.5, 0.04))
        whole.paste(tile, (TILE * number, 0))
    return whole


def main(url: str, out: Path) -> None:
    """Ask the service at ``url`` and write the picture to ``out``."""
    key = os.environ.get("VULTUS_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    picture = sheet()
    sent = io.BytesIO()
    picture.save(sent, "PNG")
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        client.post("/galleries", json={"gallery": GALLERY}).raise_for_status()
        for subject, name in ENROLLED.items():
            client.post(
                "/enroll",
                data={"subject": subject, "gallery": GALLERY},
                files={"images": (name, (IMAGES / name).read_bytes())},
            ).raise_for_status()
        answer = client.post("/identify", data={"gallery": GALLERY}, files={"image": ("sheet.png", sent.getvalue())})
        client.delete(f"/galleries/{GALLERY}").raise_for_status()
    body = answer.raise_for_status().json()
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    for face in body["faces"]:
        box, colour = face["box"], COLOURS[face["decision"]]
        corner = (box["x"], box["y"])
        draw.rectangle((*corner, box["x"] + box["width"], box["y"] + box["height"]), outline=colour, width=4)
        best = face["candidates"][0]
        text = f" {face['subject'] or 'unknown'}  {best['similarity']:.3f} "
        draw.rectangle(draw.textbbox((corner[0], corner[1] - 30), text, font=font), fill=colour)
        draw.text((corner[0], corner[1] - 30), text, fill="white", font=font)
        for point in face["landmarks"].values():
            draw.circle(point, 4, outline="white", fill=colour)
    text = f"fpr {body['fpr']}: threshold {body['threshold']:.3f} with {body['gallery_size']} people enrolled"
    draw.rectangle((0, TILE - 34, draw.textlength(text, font=font) + 16, TILE), fill="#24292f")
    draw.text((8, TILE - 30), text, fill="white", font=font)
    picture.save(out, quality=85)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
