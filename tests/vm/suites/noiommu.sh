# about: a machine without an IOMMU: no drive is bound
# machine: noiommu
# drives: exp
allow
refused "no IOMMU" "behind no IOMMU" $nt bind $(drive EXP0001)n1
