-- Keeps a worker's leases. KEYS[1] the partition's lease set.
-- ARGV: lease (ms), then org, id, fence per task. Answers one status per task: '' when the fence is stale or the
-- task is not leased, so that the worker stops its handler.
local expires = math.floor(now_us() / 1000) + tonumber(ARGV[3])
local answer = {}
for i = 4, #ARGV, 3 do
  local member = ARGV[i] .. '/' .. ARGV[i + 1]
  local fields = load(ARGV[i], ARGV[i + 1])
  local status = ''
  if fields and fields.fence == ARGV[i + 2] and redis.call('ZSCORE', KEYS[1], member) then
    redis.call('ZADD', KEYS[1], 'XX', digits(expires), member)
    status = fields.status
  end
  answer[#answer + 1] = status
end
return answer
