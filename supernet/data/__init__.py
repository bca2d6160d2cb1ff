"""Labelled images: sources, splits, augmentation and loaders. One file a source."""

from supernet.data.base import Data, DataInfo
from supernet.data.loader import Loader, Stream
from supernet.data.sources import Split
from supernet.data.transforms import Augment, eval_transform

__all__ = ["Augment", "Data", "DataInfo", "Loader", "Split", "Stream", "eval_transform"]
