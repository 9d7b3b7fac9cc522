from __future__ import annotations

from service.layout import Lot, lots, people


def test_the_first_folder_names_the_person() -> None:
    files = [
        "B/1.jpg",
        "A/x/2.PNG",
        "A/1.jpeg",
        "top.jpg",
        "A/notes.txt",
        ".git/a.jpg",
        "A/._1.jpg",
        "__MACOSX/A/1.jpg",
    ]
    assert people(files) == ([("A", "A/1.jpeg"), ("A", "A/x/2.PNG"), ("B", "B/1.jpg")], 2)


def test_lots_are_of_one_person_and_of_few_photos() -> None:
    # "A b/1" sorts before "A/1".
    photos, _ = people(["A/1.jpg", "A/2.jpg", "A/3.jpg", "A b/1.jpg", "B/1.jpg"])
    assert list(lots(photos, 2)) == [
        Lot("A", ("A/1.jpg", "A/2.jpg")),
        Lot("A", ("A/3.jpg",)),
        Lot("A b", ("A b/1.jpg",)),
        Lot("B", ("B/1.jpg",)),
    ]
