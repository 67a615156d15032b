"""ImageNet as it is downloaded, made into the folder that --data takes: train/CLASS/ and val/CLASS/.

python -m utils.prepare SOURCE DIR [--shorter PIXELS]
"""

if __name__ == "__main__":
    import utils.start  # noqa: F401

import io
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import PIL.Image
from progress.bar import Bar

from utils.cli.arguments import COUNT, Parser, path
from utils.cli.script import run_script
from utils.errors import BadInput, RunFailed
from utils.files import write_atomically
from utils.images.downloads import Job, find_splits
from utils.reports.meters import LINE_SECONDS, clock
from utils.words import counted

UNFINISHED = ".{}.unfinished"  # a split that isn't whole yet; runs pass over hidden folders
SETTINGS = ".settings"  # in that folder, what it is made with
QUALITY = 90  # of the JPEGs that --shorter writes


def main(argv: list[str]) -> int:
    """Make the folder that --data takes of ImageNet's archives, or of Kaggle's folder."""
    parser = Parser(description=main.__doc__)
    parser.add_argument("source", type=path, metavar="SOURCE", help="the folder of what was downloaded")
    parser.add_argument("folder", type=path, metavar="DIR", help="the folder to make; the same command goes on there")
    parser.add_argument(
        "--shorter", **COUNT | {"metavar": "PIXELS"}, help="reduce the shorter side of larger images to this"
    )
    parser.add_argument("--quality", **COUNT, default=QUALITY, help="of the JPEGs that --shorter writes [%(default)s]")
    parser.add_argument("-j", "--workers", **COUNT, default=os.cpu_count() or 1, help="processes [the cores]")
    args = parser.parse_args(argv)
    if args.quality > 100:
        raise BadInput(f"--quality {args.quality}: JPEG has 1 to 100")
    splits = find_splits(Path(args.source))
    for split in splits.values():
        print(split.description)
    for name, split in splits.items():
        folder, unfinished = Path(args.folder, name), Path(args.folder, UNFINISHED.format(name))
        if folder.exists():
            print(f"{folder} is there already, and stays as it is")
            continue
        settings = f"--shorter {args.shorter} --quality {args.quality}" if args.shorter else "as downloaded"
        try:
            begin(unfinished, settings)
            write = partial(write_images, unfinished, args.shorter, args.quality)
            images = prepare(name, split.jobs, write, args.workers)
            finish(unfinished, folder)
        except OSError as error:
            raise RunFailed(
                f"{error.filename or args.folder}: {error.strerror or error}; the same command goes on from there"
            ) from error
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from there", file=sys.stderr)
            return 128 + signal.SIGINT
        print(f"{folder}: {counted(images, 'image')} of {counted(len(split.classes), 'class')}")
    print(f"Train with --data {args.folder}")
    return 0


def begin(unfinished: Path, settings: str) -> None:
    """Make the folder of a split, or go on with one that was made with the same settings.

    Raises:
        BadInput: it was made with others.
    """
    unfinished.mkdir(parents=True, exist_ok=True)
    note = unfinished / SETTINGS
    if not note.exists():
        write_atomically(note, settings.encode())
    if note.read_text() != settings:
        raise BadInput(f"{unfinished} was begun {note.read_text()}: go on so, or remove it")


def finish(unfinished: Path, folder: Path) -> None:
    """Give the folder of a whole split its name, once all of it is on the disk."""
    if hasattr(os, "sync"):  # not on Windows
        os.sync()
    unfinished.rename(folder)
    (folder / SETTINGS).unlink()  # last: a folder that is gone on with must know them


def prepare(name: str, jobs: list[Job], write: Callable[[Job], int], workers: int) -> int:
    """Let several processes write the images of jobs, and show how far they are; returns how many images there are."""
    total, done, images, start = sum(job.size for job in jobs), 0, 0, time.monotonic()
    last, bar = start, Bar(name, max=max(total, 1), suffix="%(text)s") if sys.stdout.isatty() else None
    with multiprocessing.Pool(min(workers, len(jobs)) or 1, _ignore_interrupt) as pool:
        for job, count in pool.imap_unordered(partial(_with_job, write), jobs):
            done, images, now = done + job.size, images + count, time.monotonic()
            left = (now - start) * (total - done) / max(done, 1)
            rate = images / (now - start)
            text = f"{done / max(total, 1):.0%}  {images:,} images  {rate:.0f} images/s  ETA {clock(left)}"
            if bar is not None:
                bar.text = text
                bar.goto(done)
            elif now - last >= LINE_SECONDS:
                last = now
                print(name, text)
    if bar is not None:
        bar.finish()
    return images


def _ignore_interrupt() -> None:
    """Ctrl-C comes to all processes; the main one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _with_job(write: Callable[[Job], int], job: Job) -> tuple[Job, int]:
    return job, write(job)


def write_images(folder: Path, shorter: int | None, quality: int, job: Job) -> int:
    """Write the images of a job that aren't there yet, each under another name first; returns how many it has.

    Images that are files already are linked, or copied where that can't be, if nothing is to be resized.
    """
    count = 0
    for image, contents in job.contents():
        count += 1
        target = folder / image.kind / image.name
        if target.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(f".{image.name}.part")
        temporary.unlink(missing_ok=True)
        if shorter is not None:
            temporary.write_bytes(resized(contents or Path(image.path).read_bytes(), shorter, quality, image.name))
        elif contents is not None:
            temporary.write_bytes(contents)
        else:
            try:
                os.link(image.path, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(image.path, temporary)
        temporary.replace(target)
    return count


def resized(contents: bytes, shorter: int, quality: int, name: str) -> bytes:
    """An image with the shorter side reduced to so many pixels, as a JPEG with its EXIF; a smaller one as it is.

    Raises:
        BadInput: it can't be decoded.
    """
    try:
        with PIL.Image.open(io.BytesIO(contents)) as image:
            width, height = image.size
            if min(width, height) <= shorter:
                return contents
            scale = shorter / min(width, height)
            size = max(round(width * scale), shorter), max(round(height * scale), shorter)
            keep = {key: image.info[key] for key in ("exif", "icc_profile") if image.info.get(key)}
            image = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
            stream = io.BytesIO()
            image.resize(size, PIL.Image.Resampling.BICUBIC).save(stream, "JPEG", quality=quality, **keep)
            return stream.getvalue()
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise BadInput(f"{name} can't be decoded: {error}; download it again") from error


if __name__ == "__main__":
    run_script(main, "prepare.py")
