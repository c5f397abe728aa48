"""Object storage, and artifacts in it: published whole, verified when read, never unpickled."""

from raycomp.storage.artifact import Artifact, ArtifactRef, artifact_uris, open_artifact, publish
from raycomp.storage.filesystem import Store, open_store
from raycomp.storage.manifest import FORMAT_VERSION, MANIFEST, FileRecord, Manifest
from raycomp.storage.scratch import scratch
from raycomp.storage.tensors import join_state, load_metadata, load_tensors, save_tensors, split_state

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Artifact",
    "ArtifactRef",
    "FileRecord",
    "Manifest",
    "Store",
    "artifact_uris",
    "join_state",
    "load_metadata",
    "load_tensors",
    "open_artifact",
    "open_store",
    "publish",
    "save_tensors",
    "scratch",
    "split_state",
]
