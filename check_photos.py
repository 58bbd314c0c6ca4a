"""Look at a folder of photos before anything is trained on it: near-duplicates, mirror images, blur, photos
that are too small or too long, captions that are cut off or lack the subject's word, class images that show
the subject, and, with masks, a subject that is cut off or small.

The findings are printed, the most important first, and written to a page with small pictures. Nothing in the
photos' folder is changed.
"""

from dreambooth.options.command_line import parse
from dreambooth.options.photo_check import PhotoCheckOptions
from dreambooth.runtime import startup

if __name__ == "__main__":  # before the slow imports, see runtime/startup.py
    startup.begin()
    OPTIONS = parse(PhotoCheckOptions, __doc__)

from dreambooth.training import photo_check


def main(options: PhotoCheckOptions) -> None:
    """Print the findings and write the page. Raises UserError for a user's mistake."""
    photo_check.check(options)


if __name__ == "__main__":
    startup.run(main, OPTIONS)
