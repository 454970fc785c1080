#!/usr/bin/env bash
# Make the virtual environment of MONAI Label with this package in it, and install Orthanc.
#   bash tests/integration/servers/setup.sh FOLDER [PYTHON]
# 3 to 6 minutes and 2.6 GB; nothing is done twice. The tests of servers then run with
#   AHM_SERVERS=1 AHM_MONAI_LABEL=FOLDER python -m pytest -m servers
#
# A plain "pip install monailabel" fails: it asks for torchvision and sam2, which bring a torch for CUDA, and takes a
# pydicom that its own pydicom-seg cannot use. So its requirements are listed here.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: bash $0 FOLDER [PYTHON]: FOLDER becomes a virtual environment with MONAI Label" >&2
    exit 2
fi
folder=$1
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)

if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])'; then
    echo "$python is $("$python" --version 2>&1): expected Python 3.11 or 3.12, give one as the second word" >&2
    exit 2
fi
if [ -e "$folder" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
    echo "$folder exists and is no virtual environment: give another folder" >&2
    exit 2
fi

# The environment is as it should be if these very lines made it, whole.
recipe=$(cat "$0" "$here/torchvision_cpu/"torchvision_cpu.* "$root/setup.cfg" | sha256sum | cut -d' ' -f1)
if [ "$(cat "$folder/recipe" 2>/dev/null)" != "$recipe" ]; then
    echo "Installing MONAI Label; that pip calls versions of monailabel and pydicom-seg incompatible is known, and harmless."
    rm -f "$folder/recipe"
    [ -e "$folder/pyvenv.cfg" ] || "$python" -m venv "$folder"
    pip=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check)
    "${pip[@]}" torch==2.13.0
    "${pip[@]}" --no-deps monailabel==0.8.5 pydicom-seg==0.4.1 torchvision==0.28.0
    "${pip[@]}" torch==2.13.0 'monai[fire,ignite,nibabel,tensorboard,tqdm,psutil,pillow,skimage]==1.6.1' \
        'numpy>=2' 'pydicom<3' 'pynetdicom<3' 'dicomweb-client[gcp]' SimpleITK bcrypt cachetools dcmqi einops \
        expiring_dict expiringdict fastapi filelock girder-client google-auth httpx itk-io jsonschema matplotlib \
        passlib pydantic pydantic-settings pyjwt pynrrd python-dotenv python-multipart pyyaml requests \
        requests-toolbelt rich schedule scikit-learn scipy setuptools shapely timeloop typer uvicorn watchdog
    "${pip[@]}" --no-deps --editable "$root"
    packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp "$here/torchvision_cpu/"torchvision_cpu.* "$packages"
    "$folder/bin/python" -c 'import monailabel.app, ahm_engines' > /dev/null
    echo "$recipe" > "$folder/recipe"
fi
echo "MONAI Label: $folder"

orthanc() { PATH=$PATH:/usr/sbin command -v Orthanc; }
plugin=/usr/share/orthanc/plugins/libOrthancDicomWeb.so
if ! orthanc > /dev/null || [ ! -e "$plugin" ]; then
    if ! command -v apt-get > /dev/null || [ "$(id -u)" -ne 0 ]; then
        echo "Orthanc or its DICOMweb plugin is missing; as root on Debian: apt-get install orthanc orthanc-dicomweb" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends orthanc orthanc-dicomweb > /dev/null
fi
echo "Orthanc: $(orthanc)"
