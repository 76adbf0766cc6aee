"""Several big networks and a handful of images into one small network.

`kdnb.data` (images, patients, shots), `kdnb.teacher` (the networks that know), `kdnb.fusion` (several of them into one
soft target) and `kdnb.grafting` (the small network, block by block) are the four rooms to know; `kdnb.run` runs it all.
"""
__version__ = "0.1.0"
