-- Tasks for a worker: pops at most `free` of those that are ready, starts each and leases it, in one step.
-- KEYS[1] the partition's lease set. ARGV: claim id, free slots, lease (ms),
-- event (`started`), rows, then the queues. Answers a list of {org, id}.
-- The same claim id again answers with the same tasks, as long as this claim's attempt is the present one.
local claim, free, lease, event, rows = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6], ARGV[7]
local kept = key('claim', claim)
local known = redis.call('GET', kept)
if known then return cjson.decode(known) end

local now = redis.call('TIME')
local now_us = digits(tonumber(now[1]) * 1000000 + tonumber(now[2]))
local waiting = {}
for i = 8, #ARGV do
  local found = redis.call('ZRANGEBYSCORE', key('ready', ARGV[i]), '-inf', now_us, 'WITHSCORES', 'LIMIT', 0, free)
  for j = 1, #found, 2 do
    waiting[#waiting + 1] = { member = found[j], score = tonumber(found[j + 1]) }
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
  local plan = { org = org, id = id, fields = fields, type = 'started', event = event, n = '', lease = lease }
  plan.change = row(rows, fields.status)
  prepare(plan)
  plans[i] = plan
end
local answer = {}
for i, plan in ipairs(plans) do
  write(plan)
  answer[i] = { plan.org, plan.id, plan.after.fence }
end
if #answer > 0 then redis.call('SET', kept, cjson.encode(answer), 'EX', 60) end
return answer
