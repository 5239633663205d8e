-- Keeps a worker's leases. KEYS[1] the partition's lease set.
-- ARGV: the store's lease (ms), the one asked for now (ms; 0: each task's own, else the store's), then org, id, fence
-- per task. Answers one status per task: '' when the fence is stale or the task is not leased, so that the worker
-- stops its handler.
local now = math.floor(now_us() / 1000)
local default, asked = tonumber(ARGV[3]), tonumber(ARGV[4])
local answer = {}
for i = 5, #ARGV, 3 do
  local member = ARGV[i] .. '/' .. ARGV[i + 1]
  local fields = load(ARGV[i], ARGV[i + 1])
  local status = ''
  if fields and fields.fence == ARGV[i + 2] and redis.call('ZSCORE', KEYS[1], member) then
    local lease = asked
    if lease == 0 then
      lease = tonumber(redis.call('HGET', key('task', ARGV[i] .. ':' .. ARGV[i + 1]), 'lease_ms') or default)
    end
    redis.call('ZADD', KEYS[1], 'XX', digits(now + lease), member)
    status = fields.status
  end
  answer[#answer + 1] = status
end
return answer
