"""Readers and writers of the field's file formats."""

from pullback.io.angles import parse_angles as parse_angles
from pullback.io.sinograms import SinogramFile as SinogramFile
from pullback.io.sinograms import open_sinogram as open_sinogram
from pullback.io.writers import read_json as read_json
from pullback.io.writers import replacing as replacing
from pullback.io.writers import write_json as write_json
from pullback.io.writers import write_npy as write_npy
from pullback.io.writers import write_png as write_png
from pullback.io.writers import write_text as write_text
from pullback.io.writers import write_volume as write_volume
