"""Batch normalization for PyTorch that simply works."""

from batchnorm import functional as functional
from batchnorm.calibration.averaging import merge_states as merge_states
from batchnorm.calibration.calibrate import calibrate as calibrate
from batchnorm.calibration.result import Calibration as Calibration
from batchnorm.environment import env as env
from batchnorm.estimators.decayed import Decayed as Decayed
from batchnorm.estimators.running import Cumulative as Cumulative
from batchnorm.estimators.running import Running as Running
from batchnorm.estimators.window import LastBatches as LastBatches
from batchnorm.models import use_estimate as use_estimate
from batchnorm.moments import Moments as Moments
from batchnorm.moments import merge as merge
from batchnorm.nn.layers import BatchNorm as BatchNorm
from batchnorm.nn.layers import BatchNorm1d as BatchNorm1d
from batchnorm.nn.layers import BatchNorm2d as BatchNorm2d
from batchnorm.nn.layers import BatchNorm3d as BatchNorm3d
from batchnorm.nn.lazy import LazyBatchNorm1d as LazyBatchNorm1d
from batchnorm.nn.lazy import LazyBatchNorm2d as LazyBatchNorm2d
from batchnorm.nn.lazy import LazyBatchNorm3d as LazyBatchNorm3d
from batchnorm.ops.backend import use_backend as use_backend
from batchnorm.sources.batch import Batch as Batch
from batchnorm.sources.frozen import Frozen as Frozen
from batchnorm.surgery.convert import convert as convert
from batchnorm.surgery.convert import revert as revert
from batchnorm.surgery.edits import edits as edits
from batchnorm.surgery.saving import save_memory as save_memory
