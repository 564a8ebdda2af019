"""The file name suffixes of images."""

# In lower case. OpenCV decodes these formats, and Pillow reads the size from
# their headers; `transforms.decode` needs both.
SUFFIXES = (
  '.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.gif', '.bmp',
  '.tif', '.tiff', '.avif', '.ppm', '.pgm', '.pbm', '.pnm',
  '.jp2', '.j2k', '.j2c', '.jpc', '.jpf', '.jpx', '.jpeg2000',
)  # fmt: skip
