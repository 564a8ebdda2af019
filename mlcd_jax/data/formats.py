"""The names that image files have."""

# Of what OpenCV decodes and Pillow reads the size of, in lower case.
SUFFIXES = (
  '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.gif', '.bmp',
  '.tif', '.tiff', '.avif', '.ppm', '.pgm', '.pbm', '.pnm',
  '.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx', '.jpeg2000',
)  # fmt: skip
