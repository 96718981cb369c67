# SPDX-License-Identifier: Apache-2.0
"""DRE-SLCL slide encoders: importing this package registers them with the Auto classes and the pipelines."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_dre_slcl import DreSlclConfig
from .image_processing_dre_slcl import DreSlclImageProcessor
from .memory_bank import MemoryBank
from .model_outputs import DreSlclClassifierOutput, DreSlclOutput
from .modeling_dre_slcl import DreSlclModel
from .pipeline_dre_slcl import TASK, SlideFeatureExtractionPipeline
from .processing_dre_slcl import DreSlclProcessor
from .residual_encoder import ResidualEncoder
from .slide_classifier import DreSlclForSlideClassification
from .slide_state import SlideState
from .zero_shot_pipeline import ZERO_SHOT_TASK, ZeroShotSlideClassificationPipeline

AutoConfig.register("dre_slcl", DreSlclConfig, exist_ok=True)
AutoModel.register(DreSlclConfig, DreSlclModel, exist_ok=True)
AutoModelForImageClassification.register(DreSlclConfig, DreSlclForSlideClassification, exist_ok=True)
AutoImageProcessor.register(
    DreSlclConfig, image_processor_classes={"torchvision": DreSlclImageProcessor}, exist_ok=True
)
AutoProcessor.register(DreSlclConfig, DreSlclProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=SlideFeatureExtractionPipeline, pt_model=AutoModel)
PIPELINE_REGISTRY.register_pipeline(
    ZERO_SHOT_TASK, pipeline_class=ZeroShotSlideClassificationPipeline, pt_model=AutoModel
)

# What `save_pretrained` writes then names this code, so that it loads where the package is not installed.
DreSlclConfig.register_for_auto_class()
DreSlclModel.register_for_auto_class("AutoModel")
DreSlclForSlideClassification.register_for_auto_class("AutoModelForImageClassification")
DreSlclImageProcessor.register_for_auto_class("AutoImageProcessor")
DreSlclProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "DreSlclClassifierOutput",
    "DreSlclConfig",
    "DreSlclForSlideClassification",
    "DreSlclImageProcessor",
    "DreSlclModel",
    "DreSlclOutput",
    "DreSlclProcessor",
    "MemoryBank",
    "ResidualEncoder",
    "SlideFeatureExtractionPipeline",
    "SlideState",
    "ZeroShotSlideClassificationPipeline",
]
