# One look on the GPU machine. For this run only; not kept.
#   OUT=folder SMOPE_DATA=.carry/data bash benchmarks/fit_gpu.sh
export PYTHONPATH=$PWD
LONG="backbone input_proj.0 input_proj.1 input_proj.2 encoder.0 encoder.1 encoder.2 decoder.0 decoder.1 decoder.2 decoder.3
 mesh_encoder mesh_decoder similarity mesh_attention pose_head pose_maps region_reader refiners.0 refiners.1
 task.objective.detection_losses task.objective.pose_losses task.objective.mesh_losses task.objective.coordinate_loss
 task.objective.matcher.cost_table"
date +%T
timeout 200 python benchmarks/fit_kernels.py recipes/lmo.toml --rows 70 --out $OUT/fit.md > $OUT/now.log 2>&1
tail -c 400 $OUT/now.log; date +%T
TORCH_LOGS=graph_breaks,recompiles timeout 240 python benchmarks/fit_kernels.py recipes/lmo.toml --rows 70 --compile $LONG \
  --out $OUT/fit.md > $OUT/long.log 2>&1
tail -c 400 $OUT/long.log; date +%T
timeout 140 python benchmarks/fit_pieces.py > $OUT/pieces.log 2>&1
date +%T
head -c 9000 $OUT/fit.md | grep -A16 '^## '
tail -60 $OUT/pieces.log
