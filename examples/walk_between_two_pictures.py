"""An animation that leads from one picture to another through the latent space of a trained model.

.venv/bin/python examples/walk_between_two_pictures.py artifacts/train/model a.png b.jpg walk.webp
"""

import argparse

import aegan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a model's folder, as `make run` leaves it")
    parser.add_argument("start", help="a picture")
    parser.add_argument("end", help="another one")
    parser.add_argument("output", help="the animation to write, .webp")
    parser.add_argument("--frames", type=int, default=30)
    options = parser.parse_args()

    model = aegan.load(options.model)
    images = aegan.read_images([options.start, options.end], model)
    start, end = aegan.encode(model, images).split(1)
    (frames,) = aegan.interpolate(model, start, end, num_frames=options.frames)
    aegan.save_animation(frames, options.output, frames_per_second=15)


if __name__ == "__main__":
    main()
