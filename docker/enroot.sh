#!/usr/bin/env bash
# A squashfs image for pyxis: CONTAINER_IMAGE=megatron-dft.sqsh of examples/slurm/finetune.sbatch.
#
#   bash docker/enroot.sh docker                from the image that docker/Dockerfile made on this machine
#   bash docker/enroot.sh registry HOST#ORG/megatron-dft:TAG        from a registry, where no docker is
#   bash docker/enroot.sh base                  NVIDIA's image with this checkout installed on top, without docker
#
# IMAGE (megatron-dft.sqsh) names the file. It goes where every node can read it: several GB.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
image=${IMAGE:-$PWD/megatron-dft.sqsh} base=${BASE:-nvcr.io#nvidia/pytorch:26.09-py3}
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}
command -v enroot >/dev/null || die "enroot is not installed here; on a cluster it is often on the compute nodes alone"
[ ! -e "$image" ] || die "$image exists; delete it, or name another by IMAGE"
case ${1:-} in
    docker) enroot import --output "$image" dockerd://megatron-dft:latest ;;
    registry) enroot import --output "$image" "docker://${2:?expected HOST#ORG/NAME:TAG}" ;;
    base)
        work=$(mktemp -d) && trap 'rm -rf "$work"; enroot remove --force megatron-dft-build >/dev/null 2>&1' EXIT
        enroot import --output "$work/base.sqsh" "docker://$base"
        enroot create --name megatron-dft-build "$work/base.sqsh"
        # The image's own torch and Transformer Engine stay: its constraints file is kept.
        enroot start --rw --mount "$root:/src" megatron-dft-build \
            bash -c 'cp -r /src /tmp/src && python -m pip install --no-cache-dir "/tmp/src[verify]" && rm -rf /tmp/src'
        enroot export --output "$image" megatron-dft-build
        ;;
    *) die "expected docker, registry HOST#ORG/NAME:TAG, or base" ;;
esac
printf 'CONTAINER_IMAGE=%s sbatch … examples/slurm/finetune.sbatch CONFIG\n' "$image"
