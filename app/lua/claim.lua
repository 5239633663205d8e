-- Tasks for a worker: pops at most `free` of those that are ready, starts each and leases it, in one step.
-- KEYS[1] the partition's lease set. ARGV: claim id, free slots, lease (ms),
-- event (`started`), rows, then the queues. Answers a list of {org, id}.
-- The same claim id again answers with the same tasks; fences tell whether they are still this worker's.
local claim, free, lease, event, rows = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
local kept = key('claim', claim)
local known = redis.call('GET', kept)
if known then return cjson.decode(known) end

local waiting, seen = {}, {}
for i = 8, #ARGV do
  local queue = key('ready', ARGV[i])
  local found = redis.call('ZRANGEBYSCORE', queue, '-inf', digits(now_us()), 'WITHSCORES', 'LIMIT', 0, free)
  for j = 1, #found, 2 do
    if not seen[found[j]] then
      seen[found[j]] = true
      waiting[#waiting + 1] = { member = found[j], score = tonumber(found[j + 1]), queue = queue }
    end
  end
end
table.sort(waiting, function(a, b)
  if a.score ~= b.score then return a.score < b.score end
  return a.member < b.member
end)

local plans = {}
for i = 1, math.min(free, #waiting) do
  local org, id = string.match(waiting[i].member, '^([^/]*)/(.*)$')
  local fields = load(org, id)
  local change = fields and row(rows, fields.status)
  if change then
    local plan = { org = org, id = id, fields = fields, type = 'started', event = event, n = '', lease = lease }
    plan.change = change
    prepare(plan)
    plans[#plans + 1] = plan
  else
    -- Not ours, or damaged by hand: left in the queue it would stop every claim.
    redis.call('ZREM', waiting[i].queue, waiting[i].member)
  end
end
local answer = {}
for i, plan in ipairs(plans) do
  write(plan)
  answer[i] = { plan.org, plan.id, plan.after.fence }
end
if #answer > 0 then redis.call('SET', kept, cjson.encode(answer), 'EX', 60) end
return answer
