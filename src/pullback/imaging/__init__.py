"""Imaging: physics as operators, and what belongs around them."""

from pullback.imaging.calibrate import Calibration as Calibration
from pullback.imaging.calibrate import calibrate as calibrate
from pullback.imaging.dncnn import DnCNN as DnCNN
from pullback.imaging.fbp import fbp as fbp
from pullback.imaging.metrics import psnr as psnr
from pullback.imaging.metrics import rmse as rmse
from pullback.imaging.metrics import ssim as ssim
from pullback.imaging.noise import noise_level as noise_level
from pullback.imaging.noise import noise_transmission as noise_transmission
from pullback.imaging.reconstruct import Reconstruction as Reconstruction
from pullback.imaging.reconstruct import reconstruct as reconstruct
from pullback.imaging.reconstruct import tv_weight as tv_weight
from pullback.imaging.xray import XRayTransform as XRayTransform
