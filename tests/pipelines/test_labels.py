import pytest

from pipelines.ingest.labels import folder_classes


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["cats", "dogs"], ["cats", "dogs"]),
        (["set/cats", "set/dogs/large", "set"], ["cats", "dogs", None]),
        (["train/cats", "train/dogs", "val/cats"], ["cats", "dogs", "cats"]),
        (["cats/train", "cats/test", "dogs/train"], ["cats", "cats", "dogs"]),
        (["set/train", "set/test"], [None, None]),
        (["set/cats", "set/dogs", "set/set/trucks"], ["cats", "dogs", "trucks"]),
        (["data", "data/data"], [None, None]),
        (["photos", "photos/more"], [None, None]),
        (["/set/cats", "/set/dogs"], ["cats", "dogs"]),
        ([""], [None]),
    ],
)
def test_the_first_folder_of_a_source_that_not_all_images_share_is_the_class(folders, classes):
    assert folder_classes(folders, images=100) == classes


def test_a_source_with_a_folder_for_nearly_every_image_has_no_classes():
    folders = [f"person-{number}" for number in range(10)]
    assert folder_classes(folders, images=20) == folders
    assert folder_classes(folders, images=19) == [None] * 10
